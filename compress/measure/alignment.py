"""What a model's queries find in the index of another model: three scores of each retrieval task, and the share that is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compress.common.errors import UserError
from compress.measure.accuracy.paired import compare_scores, score_interval
from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.statistics import Interval
from compress.measure.accuracy.tasks import Task
from compress.measure.record import Alignment, Estimated, IndexScores
from compress.models.folder import ModelFolder

RETRIEVAL = "Retrieval"


@dataclass(frozen=True)
class CrossScores:
    """Scores by task."""

    old_on_old: Mapping[str, TaskScore]
    new_on_old: Mapping[str, TaskScore]
    new_on_new: Mapping[str, TaskScore]


def check_searches(tasks: Sequence[Task]) -> None:
    """See that every task searches.

    Raises:
        UserError: one does not; there is no index to keep.
    """
    for task in tasks:
        if task.mteb.metadata.type != RETRIEVAL:
            raise UserError(
                f"task {task.name!r}: is {task.mteb.metadata.type}, and an index is searched", "name retrieval tasks (--tasks)"
            )


def judge(old: ModelFolder, scores: CrossScores, wanted: float) -> Alignment:
    """Judge whether an index may be kept.

    Args:
        old: the model that made it.
        scores: the scores of all tasks.
        wanted: least share of the scores that has to be kept, from 0 to 1; the lower end of the interval decides.
    """
    crossed = compare_scores(scores.old_on_old, scores.new_on_old, 1 - wanted)
    anew = compare_scores(scores.old_on_old, scores.new_on_new, 1 - wanted)
    rows = []
    for name, own in scores.old_on_old.items():
        rows.append(
            IndexScores(
                task=name,
                old_on_old=_estimated(own),
                new_on_old=_estimated(scores.new_on_old[name]),
                new_on_new=_estimated(scores.new_on_new[name]),
                kept=_share(own.score, scores.new_on_old[name].score, crossed.tasks[name]),
                again=_share(own.score, scores.new_on_new[name].score, anew.tasks[name]),
            )
        )
    means = {
        way: float(np.mean([found.score for found in getattr(scores, way).values()]))
        for way in ("old_on_old", "new_on_old", "new_on_new")
    }
    kept = _share(means["old_on_old"], means["new_on_old"], crossed.overall)
    return Alignment(
        to=old.name,
        fingerprint=old.fingerprint,
        tasks=tuple(rows),
        kept=kept,
        again=_share(means["old_on_old"], means["new_on_new"], anew.overall),
        wanted=wanted,
        keep_index=(kept.value if kept.low is None else kept.low) >= wanted,
    )


def said(found: Alignment) -> str:
    """Return the verdict in one sentence."""
    kept = f"{found.kept.percent()} % of the scores of {found.to} are kept, at least {100 * found.wanted:g} % wanted"
    if found.keep_index:
        return f"you may keep your index: {kept}"
    if found.kept.high is not None and found.kept.high >= found.wanted:
        return f"not settled, so re-embed or measure on more queries: {kept}"
    return f"re-embed: {kept}"


def _estimated(found: TaskScore) -> Estimated:
    span = score_interval(found)
    return Estimated(value=found.score) if span is None else Estimated(value=found.score, low=span.low, high=span.high)


def _share(old: float, other: float, difference: Interval | None) -> Estimated:
    """Return a score as a share of the old one. The old score is taken as it is; the interval is the difference's."""
    if old <= 0:
        raise UserError("the model that made the index finds nothing on these tasks", "name other tasks (--tasks)")
    if difference is None:
        return Estimated(value=other / old)
    return Estimated(value=other / old, low=1 + difference.low / old, high=1 + difference.high / old)
