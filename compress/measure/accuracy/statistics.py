"""Is a difference between two models more than chance? A paired bootstrap over the examples both were scored on. Numpy only.

Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 6 and 13 (percentile interval); pairing as in Koehn 2004,
"Statistical Significance Tests for Machine Translation Evaluation". A resample draws examples with replacement, the same ones for
both models, so whatever makes an example hard for both cancels. An example drawn twice has weight two, so every score here takes
weights, for many resamples at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RESAMPLES = 2_000
LEVEL = 0.95
# Number of weights in one chunk of resamples. The scores allocate a few times this many numbers.
CHUNK = 4_000_000


class WeightedScore(Protocol):
    """One model's score on a task as a function of the examples' weights."""

    @property
    def count(self) -> int:
        """Number of examples."""
        ...

    def __call__(self, weights: Floats) -> Floats:
        """Return the score of each resample: weights [resamples, examples] to [resamples]."""
        ...


@dataclass(frozen=True)
class Mean:
    """Mean of one value per example: accuracy, nDCG of a query, correlation within a text."""

    values: Floats

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.values)

    def __call__(self, weights: Floats) -> Floats:
        """Return weighted means."""
        means: Floats = weights @ self.values / weights.sum(axis=1)
        return means


def _groups(values: Floats) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return the order that sorts the values, the start of each run of equal values in it, and the run of each value."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    run = np.empty(len(values), dtype=np.intp)
    run[order] = np.cumsum(first) - 1
    return order, np.flatnonzero(first), run


class Spearman:
    """Rank correlation of similarities with the annotators' scores; ties share their mean rank."""

    def __init__(self, gold: Floats, similarity: Floats) -> None:
        """Take one gold score and one similarity per example: [examples] each."""
        self.gold, self.similarity = gold, similarity
        self._groups = [_groups(values) for values in (gold, similarity)]

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.gold)

    def __call__(self, weights: Floats) -> Floats:
        """Return weighted rank correlations; 0 if all drawn examples are tied."""
        total = weights.sum(axis=1)
        centred = []
        for order, starts, run in self._groups:
            within = np.add.reduceat(weights[:, order], starts, axis=1)
            ranks = (np.cumsum(within, axis=1) - (within - 1) / 2)[:, run]
            ranks -= (np.einsum("rn,rn->r", weights, ranks) / total)[:, None]
            centred.append(ranks)
        a, b = centred
        above = np.einsum("rn,rn,rn->r", weights, a, b, optimize=True)
        spread = [np.einsum("rn,rn,rn->r", weights, x, x, optimize=True) for x in centred]
        below = np.sqrt(spread[0] * spread[1])
        correlation: Floats = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
        return correlation


class AveragePrecision:
    """Area under the precision-recall curve of pairs ranked by similarity; equal similarities are one step."""

    def __init__(self, labels: Integers, similarity: Floats) -> None:
        """Take one label (1: the pair belongs together) and one similarity (larger is closer) per example: [examples] each."""
        self.labels, self.similarity = labels, similarity
        self._order, self._starts, _ = _groups(-similarity)
        self._positive = labels[self._order].astype(np.float64)

    @property
    def count(self) -> int:
        """Number of examples."""
        return len(self.labels)

    def __call__(self, weights: Floats) -> Floats:
        """Return weighted average precisions; 0 if no drawn pair belongs together."""
        ordered = weights[:, self._order]
        within = np.add.reduceat(ordered, self._starts, axis=1)
        positive = np.add.reduceat(ordered * self._positive, self._starts, axis=1)
        seen = np.cumsum(within, axis=1)
        precision = np.divide(np.cumsum(positive, axis=1), seen, out=np.zeros_like(seen), where=seen > 0)
        total = positive.sum(axis=1)
        found: Floats = np.divide((positive * precision).sum(axis=1), total, out=np.zeros_like(total), where=total > 0)
        return found


@dataclass(frozen=True)
class Clustering:
    """One k-means run: the examples it saw (some more than once), their labels, and the clusters it found."""

    examples: Integers
    labels: Integers
    clusters: Integers


class VMeasure:
    """Mean V-measure of k-means runs (Rosenberg and Hirschberg 2007); a resample reweights examples and keeps the clusters."""

    def __init__(self, runs: Sequence[Clustering], count: int) -> None:
        """Take runs over `count` examples."""
        self._count = count
        self._runs = []
        for run in runs:
            _, labels = np.unique(run.labels, return_inverse=True)
            _, clusters = np.unique(run.clusters, return_inverse=True)
            cells = labels * (clusters.max() + 1) + clusters
            order = np.argsort(cells, kind="stable")
            ordered = cells[order]
            starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
            self._runs.append((run.examples[order], starts, ordered[starts], labels.max() + 1, clusters.max() + 1))

    @property
    def count(self) -> int:
        """Number of examples."""
        return self._count

    def __call__(self, weights: Floats) -> Floats:
        """Return weighted V-measures, averaged over the runs."""
        total = np.zeros(len(weights))
        for examples, starts, cells, labels, clusters in self._runs:
            table = np.zeros((len(weights), labels * clusters))
            table[:, cells] = np.add.reduceat(weights[:, examples], starts, axis=1)
            total += _v_measure(table.reshape(len(weights), labels, clusters))
        means: Floats = total / len(self._runs)
        return means


def _v_measure(table: Floats) -> Floats:
    """Return the V-measure of contingency tables [resamples, labels, clusters]; 1 if there is a single label and cluster."""
    share = table / table.sum(axis=(1, 2), keepdims=True)

    def entropy(p: Floats) -> Floats:
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        summed: Floats = -(p * logs).reshape(len(p), -1).sum(axis=1)
        return summed

    of_labels, of_clusters, joint = entropy(share.sum(axis=2)), entropy(share.sum(axis=1)), entropy(share)
    mutual = of_labels + of_clusters - joint
    both = of_labels + of_clusters
    return np.divide(2 * mutual, both, out=np.ones_like(both), where=both > 1e-12)


class Verdict(StrEnum):
    """Judgement of a difference against a margin."""

    KEPT = "kept"
    REGRESSED = "regressed"
    INCONCLUSIVE = "inconclusive"


class Interval(BaseModel):
    """A difference of scores (variant minus baseline) with its confidence interval."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    delta: float
    low: float
    high: float
    margin: float
    """Accepted loss, as a positive difference of scores."""
    examples: int

    def __str__(self) -> str:
        """Return its ends in points: scores x 100."""
        return f"{100 * self.low:+.2f} to {100 * self.high:+.2f}"

    @property
    def verdict(self) -> Verdict:
        """Kept if even the lower end loses less than the margin; regressed if even the upper end loses more; else inconclusive."""
        if self.low > -self.margin or (self.low == self.high == 0):
            return Verdict.KEPT
        return Verdict.REGRESSED if self.high < -self.margin else Verdict.INCONCLUSIVE

    @property
    def more_examples(self) -> int | None:
        """About how many more examples would settle an inconclusive verdict; None if it is settled, or no number would settle it.

        The interval narrows with the square root of the number of examples; the end beyond the margin has to move inside it.
        """
        if self.verdict is not Verdict.INCONCLUSIVE:
            return None
        distance = abs(self.delta + self.margin)
        reach = self.delta - self.low if self.delta > -self.margin else self.high - self.delta
        if distance == 0:
            return None
        return max(1, math.ceil(self.examples * ((reach / distance) ** 2 - 1)))


@dataclass(frozen=True)
class PairedComparison:
    """Intervals of the difference by task (None if a task has no scores of single examples) and of the mean over the others."""

    tasks: Mapping[str, Interval | None]
    overall: Interval | None


def differences(baseline: WeightedScore, variant: WeightedScore, *, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Return the difference, variant minus baseline, on `resamples` draws of their common examples: [resamples].

    Raises:
        ValueError: the two have different numbers of examples, or none.
    """
    count = baseline.count
    if count != variant.count or count == 0:
        raise ValueError(f"both models are scored on the same examples, got {count} and {variant.count}")
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK // count)
    draws = []
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)
        draws.append(variant(weights) - baseline(weights))
    return np.concatenate(draws)


def score(statistic: WeightedScore) -> float:
    """Return the score with all weights one."""
    return float(statistic(np.ones((1, statistic.count)))[0])


def interval(draws: Floats, delta: float, margin: float, examples: int) -> Interval:
    """Return the percentile interval of a difference from its bootstrap draws."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(delta=delta, low=float(low), high=float(high), margin=margin, examples=examples)
