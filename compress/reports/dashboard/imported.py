"""Results that others measured, for the dashboard's picture: mteb's result folders and those of HAKARI-Bench.

An imported model has a score for each task, and a size where its files say one; it has no interval, no speed and no memory. mteb
writes `results/MODEL/REVISION/TASK.json` with `model_meta.json` next to it (mteb 2.26, `mteb/results/task_result.py`), HAKARI-Bench
`MODEL/DATASET/TASK.json`, where a model's quantized and truncated vectors are entries of their own (`hakari_bench/results.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from pydantic import BaseModel

from compress.common.errors import UserError
from compress.common.inputs import checked, read_object

MAIN = "main_score"
META = "model_meta.json"
TEST = "test"
LEVELS = 4
"""Folders between a given one and a result: `results/MODEL/REVISION/TASK.json` in a checkout's root has three."""
MEGABYTE = 2**20
"""What mteb counts `memory_usage_mb` in."""
HALF = 2
DTYPE_BYTES = {"fp32": 4, "float32": 4, "bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2}
SKIPPED = ("all.json",)
"""HAKARI-Bench's sum of the other files."""


@dataclass
class Imported:
    """A model as others have measured it."""

    model: str
    revision: str
    source: str
    """`mteb` or `HAKARI-Bench`."""
    variant: str = ""
    """What was done to the vectors; empty for the model as it is."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task: scores by metric, 0 to 1; `main_score` is always there."""
    bytes: int | None = None
    """Size of the weights; None: not known."""
    assumed: bool = False
    """Whether the size was computed from the number of parameters at two bytes each."""

    @property
    def name(self) -> str:
        """A name that no other import has."""
        variant = f" ({self.variant})" if self.variant else ""
        return f"{self.source}: {self.model}@{self.revision}{variant}"

    def score(self, task: str, metric: str = MAIN) -> float:
        """Return the score of a task by a metric, or its main score where it has no such metric."""
        found = self.scores[task]
        return found.get(metric, found[MAIN])


class _MtebResult(BaseModel):
    task_name: str
    scores: dict[str, list[dict[str, Any]]]


class _MtebMeta(BaseModel):
    name: str | None = None
    revision: str | None = None
    n_parameters: int | None = None
    memory_usage_mb: float | None = None


class _HakariModel(BaseModel):
    id: str | None = None
    name_or_path: str | None = None
    source: dict[str, Any] | None = None
    dtype: str | None = None
    total_parameters: int | None = None


class _HakariTarget(BaseModel):
    dataset_name: str
    task_name: str


class _HakariEntry(BaseModel):
    name: str = "base"
    aggregate_metric: str
    aggregate_metric_value: float
    embedding_evaluations: list[dict[str, Any]] = []


def read_imported(places: Sequence[Path]) -> tuple[list[Imported], dict[str, str]]:
    """Read other people's results.

    Args:
        places: folders of results, of a model or of a revision.

    Returns:
        The models, and for each place or file that could not be read the reason.
    """
    found: dict[str, Imported] = {}
    broken: dict[str, str] = {}
    for place in places:
        count = 0
        for path in _results_in(place):
            try:
                for one in _read(path):
                    kept = found.setdefault(one.name, one)
                    kept.scores |= one.scores
                    count += 1
            except UserError as error:
                broken[str(path)] = error.message
        if not count:
            broken.setdefault(str(place), "no results of mteb or HAKARI-Bench" if place.is_dir() else "no such folder")
    return list(found.values()), broken


def _results_in(place: Path) -> Iterator[Path]:
    for level in range(LEVELS):
        for path in sorted(place.glob("*/" * level + "*.json")):
            if path.name not in (META, *SKIPPED):
                yield path


def _read(path: Path) -> list[Imported]:
    content = read_object(path)
    if "task_name" in content and "scores" in content:
        return [_mteb(path, checked(content, _MtebResult, str(path)))]
    if "target" in content and "evaluation" in content:
        return _hakari(path, content)
    raise UserError(f"{path}: neither a result of mteb (task_name, scores) nor of HAKARI-Bench (target, evaluation)")


def _mteb(path: Path, result: _MtebResult) -> Imported:
    meta = (
        checked(read_object(path.parent / META), _MtebMeta, str(path.parent / META))
        if (path.parent / META).is_file()
        else _MtebMeta()
    )
    made = Imported(
        model=meta.name or path.parent.parent.name.replace("__", "/"),
        revision=meta.revision or path.parent.name,
        source="mteb",
        scores={result.task_name: _mteb_scores(path, result.scores)},
    )
    if meta.memory_usage_mb is not None:
        made.bytes = round(meta.memory_usage_mb * MEGABYTE)
    elif meta.n_parameters is not None:
        made.bytes, made.assumed = HALF * meta.n_parameters, True
    return made


def _mteb_scores(path: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Return the scores by metric, as means over the subsets of one split, as mteb averages them."""
    if TEST not in splits and len(splits) != 1:
        raise UserError(f"{path}: scores: has the splits {', '.join(splits) or 'none'}, of which none is {TEST}")
    entries = splits.get(TEST) or next(iter(splits.values()))
    metrics = [name for name, value in (entries[0].items() if entries else ()) if isinstance(value, float | int)]
    if MAIN not in metrics or not all(isinstance(entry.get(MAIN), float | int) for entry in entries):
        raise UserError(f"{path}: scores: a subset has no number as {MAIN}")
    found = {
        name: mean(float(entry[name]) for entry in entries) for name in metrics if all(_is_number(e.get(name)) for e in entries)
    }
    _check_share(path, found[MAIN])
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _check_share(path: Path, score: float) -> None:
    if not -1 <= score <= 1:
        raise UserError(f"{path}: the score {score:g} is not between -1 and 1")


def _hakari(path: Path, content: Mapping[str, Any]) -> list[Imported]:
    """Return the model as it is, and one more for each way in which its vectors were stored."""
    model = checked(content.get("model"), _HakariModel, f"{path}: model")
    target = checked(content["target"], _HakariTarget, f"{path}: target")
    base = checked(content["evaluation"], _HakariEntry, f"{path}: evaluation")
    others = base.embedding_evaluations or content.get("embedding_evaluations", [])
    variants = [checked(other, _HakariEntry, f"{path}: embedding_evaluations") for other in others]
    name = model.id or model.name_or_path or path.parent.parent.name.replace("__", "/")
    revision = str((model.source or {}).get("revision") or "unknown")
    made = []
    for entry in (base, *(variant for variant in variants if variant.name != "base")):
        _check_share(path, entry.aggregate_metric_value)
        scores = {f"{target.dataset_name}/{target.task_name}": {MAIN: entry.aggregate_metric_value}}
        one = Imported(name, revision, "HAKARI-Bench", "" if entry is base else entry.name, scores)
        if model.total_parameters:
            one.bytes = model.total_parameters * DTYPE_BYTES.get(model.dtype or "", HALF)
            one.assumed = model.dtype not in DTYPE_BYTES
        made.append(one)
    return made
