"""Compares two models on the same tasks: the difference per task and overall, with its interval and a verdict against a margin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.measure.accuracy.examples import Examples, SplitExamples, paired_draws
from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.statistics import RESAMPLES, Interval, PairedComparison, interval


def score_interval(found: TaskScore, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval | None:
    """Return the interval of a model's own score; None if the task has no scores of single examples. `margin` is 0."""
    if not found.examples.parts:
        return None
    # The difference from a model that scores 0 on every example.
    nothing = [SplitExamples(kind="mean", values=[[0.0] * part.count], count=part.count) for part in found.examples.parts]
    drawn = paired_draws(Examples(parts=tuple(nothing)), found.examples, resamples=resamples, seed=seed)
    return interval(drawn, found.score, 0.0, found.examples.count)


def compare_scores(
    baseline: Mapping[str, TaskScore], variant: Mapping[str, TaskScore], margin: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedComparison:
    """Compare two models' scores of the same tasks.

    Args:
        baseline: scores by task.
        variant: scores by task.
        margin: accepted loss, as a share of the baseline's score.
        resamples: number of bootstrap draws.
        seed: seed of the bootstrap. A task's draws depend only on it and on the number of examples.
    """
    intervals: dict[str, Interval | None] = {}
    draws = []
    for name, ours in baseline.items():
        theirs = variant[name]
        if not ours.examples.parts or not theirs.examples.parts:
            intervals[name] = None
            continue
        drawn = paired_draws(ours.examples, theirs.examples, resamples=resamples, seed=seed)
        draws.append(drawn)
        intervals[name] = interval(drawn, theirs.score - ours.score, margin * ours.score, ours.examples.count)
    judged = [name for name, found in intervals.items() if found is not None]
    if not judged:
        return PairedComparison(intervals, None)
    means = [float(np.mean([scores[name].score for name in judged])) for scores in (baseline, variant)]
    examples = sum(baseline[name].examples.count for name in judged)
    # Tasks with equally many examples were drawn with the same random numbers. Shuffling makes their draws independent.
    overall = np.mean([np.random.default_rng([seed, index]).permutation(drawn) for index, drawn in enumerate(draws)], axis=0)
    return PairedComparison(intervals, interval(overall, means[1] - means[0], margin * means[0], examples))
