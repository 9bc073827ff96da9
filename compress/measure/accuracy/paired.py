"""Two models on the same tasks: the difference on each and over all, with its interval and a verdict against a margin."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compress.measure.accuracy.examples import paired_draws
from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.statistics import RESAMPLES, Interval, PairedComparison, interval


def compare_scores(
    baseline: Mapping[str, TaskScore], variant: Mapping[str, TaskScore], margin: float, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedComparison:
    """Compare scores of the same tasks.

    Args:
        baseline: by task.
        variant: by task.
        margin: loss that is accepted, as a share of the baseline's score.
        resamples: of the bootstrap.
        seed: of the bootstrap; a task's draws depend on it and on the number of its examples alone.
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
    # Tasks with equally many examples were drawn with the same numbers; shuffled, their draws are independent of each other.
    overall = np.mean([np.random.default_rng([seed, index]).permutation(drawn) for index, drawn in enumerate(draws)], axis=0)
    return PairedComparison(intervals, interval(overall, means[1] - means[0], margin * means[0], examples))
