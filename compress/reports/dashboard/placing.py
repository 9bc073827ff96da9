"""Where imported models stand: in each comparable set whose tasks they were all scored on, else in a set of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import mean
from typing import Any

from compress.measure.record import TaskRow
from compress.reports.compare import Group, Line
from compress.reports.dashboard.imported import MAIN, Imported

TaskScores = tuple[str, str, float | None, float]
"""A task, its metric, the baseline's score if there is one, the model's score."""
ELSEWHERE = "measured elsewhere"
FAMILY = "imported"


def placed(
    imports: Sequence[Imported], groups: Sequence[Group], baselines: Sequence[Sequence[TaskRow]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the imported models as runs of the page, and the sets that they need in addition.

    In a set of records, what is kept is the mean of the model's scores on the set's tasks divided by the mean of the baseline's,
    as for a run. In a set of its own, a variant of HAKARI-Bench is divided by the same model without it, and a model by nothing.

    Args:
        imports: the imported models.
        groups: the comparable sets of records.
        baselines: the tasks of each set, with the scores of its baseline.
    """
    runs: list[dict[str, Any]] = []
    own: dict[tuple[str, ...], int] = {}
    plain = {(one.source, one.model, one.revision): one for one in imports if not one.variant}
    for one in imports:
        rows: list[TaskScores]
        sets = [number for number, tasks in enumerate(baselines) if tasks and all(task.task in one.scores for task in tasks)]
        for number in sets:
            rows = [(task.task, task.metric, task.baseline, one.score(task.task, task.metric)) for task in baselines[number]]
            name = one.name if len(sets) == 1 else f"{one.name} in {groups[number].model}'s set {number + 1}"
            runs.append(_run(one, name, number, rows))
        if not sets:
            tasks = tuple(sorted(one.scores))
            number = own.setdefault(tasks, len(groups) + len(own))
            other = plain.get((one.source, one.model, one.revision)) if one.variant else None
            known = other is not None and set(tasks) <= set(other.scores)
            rows = [(task, MAIN, other.score(task) if other is not None and known else None, one.score(task)) for task in tasks]
            runs.append(_run(one, one.name, number, rows))
    return runs, [_set(tasks) for tasks in own]


def _set(tasks: Sequence[str]) -> dict[str, Any]:
    title = f"imported; {', '.join(tasks)}; {ELSEWHERE}"
    return {
        "model": "imported",
        "tasks": list(tasks),
        "machine": ELSEWHERE,
        "versions": {},
        "measured_on": ELSEWHERE,
        "title": title,
    }


def _run(one: Imported, name: str, number: int, rows: Sequence[TaskScores]) -> dict[str, Any]:
    """Return a run of the page: a line whose fields are empty where nothing was measured, and a record that has tasks only."""
    against = [baseline for _, _, baseline, _ in rows if baseline is not None]
    scored = mean(score for _, _, _, score in rows)
    kept = scored / mean(against) if len(against) == len(rows) and mean(against) > 0 else None
    line: dict[str, Any] = dict.fromkeys(part.name for part in fields(Line))
    size = " (its parameters at two bytes each)" if one.assumed else ""
    return line | {
        "run": name,
        "recipe": one.model.rpartition("/")[2] + (f" ({one.variant})" if one.variant else ""),
        "weights": f"as published{size}" if one.bytes is not None else "size unknown",
        "activations": "none",
        "runtime": FAMILY,
        "bytes": one.bytes,
        "kept": kept,
        "mean": scored,
        "regressed": [],
        "optimal": False,
        "model": one.model,
        "machine": ELSEWHERE,
        "methods": [],
        "family": FAMILY,
        "p99_ms": None,
        "loaded_bytes": None,
        "group": number,
        "imported": {"source": one.source, "revision": one.revision},
        "record": {"tasks": [_task(*row) for row in rows], "steps": [], "rows": [], "fidelity": None},
    }


def _task(task: str, metric: str, baseline: float | None, score: float) -> Mapping[str, Any]:
    return {"task": task, "metric": metric, "baseline": baseline, "variant": score, "interval": None, "verdict": None}
