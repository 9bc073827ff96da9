"""Compares runs: one group per comparable set, and which runs no other run beats. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from compress.common.errors import UserError
from compress.measure.record import RECORD_FILE, Record

# Packages that scores, and speed in torch, depend on.
DECISIVE = ("torch", "transformers", "mteb", "sentence-transformers", "scikit-learn", "numpy")
# Speedups that differ by less count as equal: the same model measured twice differs by as much.
SAME_SPEED = 0.03
WIDTH = 140  # fixed, so that quoted output looks the same wherever it was printed


@dataclass(frozen=True)
class Line:
    """A run as it is compared. Shares are relative to the baseline; None means that the run did not measure it."""

    run: str
    recipe: str
    weights: str
    activations: str
    runtime: str
    bytes: int
    size: float
    """Bytes relative to the baseline in half precision."""
    kept: float | None
    """Mean score relative to the baseline's."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval of `kept`."""
    verdict: str | None
    regressed: tuple[str, ...]
    """Tasks with the verdict `regressed`."""
    cosine: float | None
    overlap: float | None
    """Shared part of the ten nearest neighbours."""
    speedup: float | None
    """Throughput relative to the first baseline: float32 on a CPU, float16 on a GPU."""
    texts_per_second: float | None
    latency_ms: float | None
    peak_bytes: int | None
    optimal: bool = False
    """Whether no other run of the group keeps as much, is as small and as fast, and is better in one of these."""


@dataclass(frozen=True)
class Group:
    """Runs whose numbers are comparable."""

    model: str
    tasks: tuple[str, ...]
    machine: str
    versions: Mapping[str, str]
    measured_on: str
    lines: tuple[Line, ...]
    """The runs; those that keep most come first."""

    @property
    def title(self) -> str:
        """What the runs have in common."""
        tasks = ", ".join(self.tasks) if self.tasks else "no accuracy"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}; {tasks}; {self.machine}; {packages}"


@dataclass(frozen=True)
class Comparison:
    """Runs in groups, and the folders that could not be read."""

    groups: tuple[Group, ...]
    broken: Mapping[str, str]
    """Why a folder could not be read, by folder."""


def find_runs(places: Iterable[Path]) -> tuple[list[Path], dict[str, str]]:
    """Return the folders of runs: a place that holds a record, or else the folders inside it that do.

    Returns:
        The folders; and for each place without any, the reason.
    """
    found: dict[Path, None] = {}
    broken = {}
    for place in places:
        inside = [place] if (place / RECORD_FILE).exists() else sorted(path.parent for path in place.glob(f"*/{RECORD_FILE}"))
        if not inside:
            broken[str(place)] = f"no {RECORD_FILE} here or in its folders" if place.is_dir() else "no such folder"
        found |= dict.fromkeys(inside)
    return list(found), broken


def read_records(places: Sequence[Path]) -> tuple[dict[Path, Record], dict[str, str]]:
    """Read the records of runs, given their folders or folders of runs.

    Returns:
        The records by folder; and for each place that could not be read, the reason.

    Raises:
        UserError: there is no readable record.
    """
    folders, broken = find_runs(places)
    records = {}
    for folder in folders:
        try:
            record = _checked(Record.read(folder))
            line_of(record)
            records[folder] = record
        except UserError as error:
            broken[str(folder)] = error.message
        except Exception as error:  # of any kind: one bad record does not take the others down, and is named with the reason
            broken[str(folder)] = f"{folder / RECORD_FILE}: cannot be shown ({type(error).__name__}: {error})"
    if not records:
        reasons = "; ".join(f"{place}: {reason}" for place, reason in broken.items())
        raise UserError(f"nothing to compare: {reasons}", "compress run RECIPE writes a record under results/")
    return records, broken


def compare_runs(places: Sequence[Path]) -> Comparison:
    """Compare runs, given their folders or folders of runs; raises what `read_records` raises."""
    records, broken = read_records(places)
    return Comparison(grouped(records.values()), broken)


def grouped(records: Iterable[Record]) -> tuple[Group, ...]:
    """Group comparable runs; the largest group comes first."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(_key(record)), []).append(record)
    made = []
    for together in groups.values():
        lines = optimal([line_of(record) for record in together])
        lines.sort(key=lambda line: (-(line.kept if line.kept is not None else -1), line.bytes))
        first = together[0]
        made.append(
            Group(
                model=first.model.name,
                tasks=tuple(task.task for task in first.tasks),
                machine=_machine(first),
                versions=_versions(first),
                measured_on=first.measured_on,
                lines=tuple(lines),
            )
        )
    return tuple(sorted(made, key=lambda group: (-len(group.lines), group.title)))


def _key(record: Record) -> list[Any]:
    """Return what must be equal for two runs to be comparable."""
    tasks = [[task.task, task.data, task.prompts] for task in record.tasks]
    return [record.model.name, record.model.fingerprint, tasks, _machine(record), _versions(record), record.measured_on]


def _machine(record: Record) -> str:
    machine = record.machine
    special = [name for name in machine.instructions if name != "avx2"]
    return machine.gpu or f"{machine.cores} cores of {machine.cpu}" + (f" ({', '.join(special)})" if special else "")


def _versions(record: Record) -> dict[str, str]:
    return {name: record.versions[name] for name in DECISIVE if name in record.versions}


def _checked(record: Record) -> Record:
    """Return a record whose parts fit together, so that every report can show it.

    Raises:
        UserError: it has no row of the variant, or lacks a recipe's name or a step's method, or has a number that is none.
    """
    place = f"{RECORD_FILE} of {record.run}"
    if not any(row.name == "variant" for row in record.rows):
        raise UserError(f"{place}: rows: has none of the variant")
    if "name" not in record.recipe:
        raise UserError(f"{place}: recipe: has no name")
    for number, step in enumerate(record.steps):
        if "method" not in step.config:
            raise UserError(f"{place}: steps.{number}.config: has no method")
    if record.model.parameters <= 0:
        raise UserError(f"{place}: model.parameters: {record.model.parameters} is not a number of parameters")
    try:
        json.dumps(record.model_dump(mode="python"), allow_nan=False, default=str)
    except ValueError as error:
        raise UserError(f"{place}: has a number that is not finite") from error
    return record


def line_of(record: Record) -> Line:
    """Return the line of a record."""
    variant = record.row("variant")
    fidelity, speed = record.fidelity, variant.speed
    low = high = None
    if record.overall is not None:
        baseline = mean(task.baseline for task in record.tasks)
        low, high = (1 + end / baseline for end in (record.overall.low, record.overall.high))
    return Line(
        run=record.run,
        recipe=str(record.recipe["name"]),
        weights=variant.weights,
        activations=variant.activations,
        runtime=variant.runtime,
        bytes=variant.size_bytes,
        size=variant.size_bytes / (2 * record.model.parameters),
        kept=record.retained,
        low=low,
        high=high,
        verdict=record.overall.verdict if record.overall else None,
        regressed=tuple(task.task for task in record.tasks if task.verdict == "regressed"),
        cosine=fidelity.cosine_mean if fidelity else None,
        overlap=fidelity.overlap_at_10 if fidelity else None,
        speedup=next(iter(variant.speedup.values()), None),
        texts_per_second=speed.texts_per_second if speed else None,
        latency_ms=speed.latency_p50_ms if speed else None,
        peak_bytes=(speed.gpu_peak_bytes if record.machine.gpu else speed.peak_bytes) if speed else None,
    )


def optimal(lines: Sequence[Line]) -> list[Line]:
    """Mark the Pareto-optimal runs: of the scored ones, those that no other run equals in everything and beats in something.

    A run that was not timed is beaten by one that keeps more and is smaller; it beats no run that was timed.
    """

    def beats(one: Line, other: Line) -> bool:
        if one.kept is None or other.kept is None or (one.speedup is None and other.speedup is not None):
            return False
        pairs: list[tuple[float, float]] = [(one.kept, other.kept), (-one.bytes, -other.bytes)]
        if one.speedup is not None and other.speedup is not None:
            same = abs(one.speedup - other.speedup) < SAME_SPEED * abs(other.speedup)
            pairs.append((0, 0) if same else (one.speedup, other.speedup))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [
        Line(**{**asdict(line), "optimal": line.kept is not None and not any(beats(other, line) for other in lines)})
        for line in lines
    ]
