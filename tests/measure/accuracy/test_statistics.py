"""Intervals: each statistic against its own textbook form, and how often the interval covers a difference that is known."""

from __future__ import annotations

from math import asin, pi

import numpy as np
import pytest
from scipy.stats import norm, spearmanr
from sklearn.metrics import average_precision_score, v_measure_score

from compress.measure.accuracy.statistics import (
    AveragePrecision,
    Clustering,
    Interval,
    Mean,
    Spearman,
    Verdict,
    VMeasure,
    WeightedScore,
    differences,
    interval,
    score,
)


def drawn(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a resample, and its weights."""
    chosen = np.random.default_rng(seed).integers(count, size=count)
    return chosen, np.bincount(chosen, minlength=count)[None].astype(float)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_the_resample_itself(seed: int) -> None:
    """With ties in scores and similarities, as annotators and rounding make them."""
    generator = np.random.default_rng(seed)
    gold, similarity = generator.integers(0, 6, 80).astype(float), generator.standard_normal(80).round(1)
    labels = generator.integers(0, 2, 80)
    chosen, weights = drawn(80, seed)
    assert Spearman(gold, similarity)(weights)[0] == pytest.approx(spearmanr(gold[chosen], similarity[chosen]).statistic, abs=1e-12)
    expected = average_precision_score(labels[chosen], similarity[chosen])
    assert AveragePrecision(labels, similarity)(weights)[0] == pytest.approx(expected, abs=1e-12)
    assert Mean(similarity)(weights)[0] == pytest.approx(similarity[chosen].mean(), abs=1e-12)
    topics, clusters = generator.integers(0, 5, 80), generator.integers(0, 4, 80)
    run = Clustering(np.arange(80), topics, clusters)
    assert VMeasure([run], 80)(weights)[0] == pytest.approx(v_measure_score(topics[chosen], clusters[chosen]), abs=1e-12)


def test_clusterings_of_samples_are_averaged() -> None:
    generator = np.random.default_rng(0)
    runs = []
    for _ in range(3):
        examples = generator.integers(0, 50, 200)
        runs.append(Clustering(examples, examples % 4, generator.integers(0, 4, 200)))
    expected = np.mean([v_measure_score(run.labels, run.clusters) for run in runs])
    assert score(VMeasure(runs, 50)) == pytest.approx(expected, abs=1e-12)


def test_two_copies_of_a_model_are_kept_with_nothing_in_doubt() -> None:
    generator = np.random.default_rng(0)
    gold, similarity = generator.standard_normal((2, 100))
    draws = differences(Spearman(gold, similarity), Spearman(gold, similarity.copy()), resamples=200)
    found = interval(draws, 0.0, 0.01, 100)
    assert (found.low, found.high, found.verdict) == (0, 0, Verdict.KEPT)
    assert interval(draws, 0.0, 0.0, 100).verdict is Verdict.KEPT


def test_verdicts_against_the_margin() -> None:
    def judged(low: float, high: float) -> Interval:
        return Interval(delta=(low + high) / 2, low=low, high=high, margin=0.01, examples=100)

    assert judged(-0.005, 0.01).verdict is Verdict.KEPT
    assert judged(-0.04, -0.02).verdict is Verdict.REGRESSED
    assert judged(-0.02, 0.0).verdict is Verdict.INCONCLUSIVE
    assert judged(-0.005, 0.01).more_examples is None
    assert judged(-0.02, 0.0).more_examples is None  # right on the margin: no number of examples moves it
    assert judged(-0.02, 0.02).more_examples == 300  # delta 0, reach 0.02: half of it wants four times the examples


def test_how_many_more_examples_settle_it() -> None:
    """Told after 100 examples; with that many more the interval ends where the margin is."""
    generator = np.random.default_rng(1)
    values = generator.normal(-0.004, 0.05, 100_000)

    def found(count: int) -> Interval:
        part = values[:count]
        draws = differences(Mean(np.zeros(count)), Mean(part), resamples=1000)
        return interval(draws, float(part.mean()), 0.01, count)

    early = found(200)
    assert early.verdict is Verdict.INCONCLUSIVE
    assert early.more_examples is not None
    assert found(200 + 2 * early.more_examples).verdict is not Verdict.INCONCLUSIVE


def test_different_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="same examples, got 3 and 4"):
        differences(Mean(np.zeros(3)), Mean(np.zeros(4)))


def spearman_pair(generator: np.random.Generator) -> tuple[WeightedScore, WeightedScore]:
    gold, noise, other = generator.standard_normal((3, 250))
    mixed = 0.9 * noise + np.sqrt(1 - 0.81) * other
    return Spearman(gold, 0.8 * gold + 0.6 * noise), Spearman(gold, 0.77 * gold + np.sqrt(1 - 0.77**2) * mixed)


def precision_pair(generator: np.random.Generator) -> tuple[WeightedScore, WeightedScore]:
    labels = (generator.random(400) < 0.4).astype(np.int64)
    noise, other = generator.standard_normal((2, 400))
    mixed = 0.9 * noise + np.sqrt(1 - 0.81) * other
    return AveragePrecision(labels, 1.5 * labels + noise), AveragePrecision(labels, 1.35 * labels + mixed)


def accuracy_pair(generator: np.random.Generator) -> tuple[WeightedScore, WeightedScore]:
    """Ten classifiers' decisions on each text, as mteb trains ten."""
    ease = generator.normal(1, 1.5, 250)[:, None]
    noise, other = generator.standard_normal((2, 250, 10))
    mixed = 0.9 * noise + np.sqrt(1 - 0.81) * other
    return Mean((noise < ease).mean(axis=1)), Mean((mixed < ease - 0.1).mean(axis=1))


def ndcg_pair(generator: np.random.Generator) -> tuple[WeightedScore, WeightedScore]:
    """One relevant document a query; the variant loses a rank in one query of five."""
    rank = generator.geometric(0.5, 250)
    worse = rank + (generator.random(250) < 0.2)
    return Mean(gain(rank)), Mean(gain(worse))


def gain(rank: np.ndarray) -> np.ndarray:
    return np.where(rank <= 10, 1 / np.log2(rank + 1), 0.0)


def true_precision(shift: float) -> float:
    """Average precision of infinitely many pairs, two in five of which belong together."""
    cut = np.linspace(-8, 12, 200_001)
    found, false = norm.sf(cut - shift), norm.sf(cut)
    precision = 0.4 * found / np.maximum(0.4 * found + 0.6 * false, 1e-300)
    return float(np.sum(precision * norm.pdf(cut - shift)) * (cut[1] - cut[0]))


def true_ndcg() -> float:
    ranks = np.arange(1, 60)
    share = 0.5**ranks
    return float(0.2 * (share * (gain(ranks + 1) - gain(ranks))).sum())


KNOWN = {
    "spearman": (spearman_pair, 6 / pi * (asin(0.77 / 2) - asin(0.8 / 2))),
    "average precision": (precision_pair, true_precision(1.35) - true_precision(1.5)),
    "accuracy": (accuracy_pair, norm.cdf(0.9 / np.sqrt(3.25)) - norm.cdf(1 / np.sqrt(3.25))),
    "ndcg": (ndcg_pair, true_ndcg()),
}


QUICK = ("accuracy", "ndcg")
"""Those that are drawn in a moment."""


def coverage(name: str, simulations: int) -> float:
    make, truth = KNOWN[name]
    generator, covered = np.random.default_rng(20), 0
    for index in range(simulations):
        baseline, variant = make(generator)
        found = interval(differences(baseline, variant, resamples=1000, seed=index), 0.0, 0.01, baseline.count)
        covered += found.low <= truth <= found.high
    return covered / simulations


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_the_interval_covers_the_true_difference(name: str) -> None:
    assert 0.935 <= coverage(name, 2000) <= 0.965


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in KNOWN])
def test_the_interval_covers_the_true_difference_about_as_often_as_it_says(name: str) -> None:
    assert 0.9 <= coverage(name, 200) <= 0.99
