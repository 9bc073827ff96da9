"""Runs side by side: what is comparable in one table, the rest in others, and which runs no other beats. No torch here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from compress.errors import UserError, nearest
from compress.memory import gigabytes
from compress.plot import Panel, Point, figure
from compress.record import RECORD_FILE, Record

# Of the packages that a record lists, those that scores and speed in torch depend on.
DECISIVE = ("torch", "transformers", "mteb", "sentence-transformers", "scikit-learn", "numpy")
# Ratios of throughput that differ by less are not told apart: the same model, measured twice, does.
SAME_SPEED = 0.03
WIDTH = 140  # fixed, so that what is quoted looks the same wherever it was printed


@dataclass(frozen=True)
class Line:
    """A run as it is compared. Shares are of the baseline; None where the run did not measure it."""

    run: str
    recipe: str
    weights: str
    activations: str
    runtime: str
    bytes: int
    size: float
    """Of the half-precision baseline's bytes."""
    kept: float | None
    """Mean score over the baseline's."""
    low: float | None
    high: float | None
    """The 95 % interval of `kept`."""
    verdict: str | None
    regressed: tuple[str, ...]
    """Tasks whose verdict that is."""
    cosine: float | None
    overlap: float | None
    """Of ten nearest neighbours."""
    speedup: float | None
    """Throughput over that of the first baseline: float32 on a CPU, float16 on a GPU."""
    texts_per_second: float | None
    latency_ms: float | None
    peak_bytes: int | None
    optimal: bool = False
    """Whether no other run of the group keeps as much, is as small and as fast, and better in one of these."""


@dataclass(frozen=True)
class Group:
    """Runs whose numbers may stand side by side."""

    model: str
    tasks: tuple[str, ...]
    machine: str
    versions: Mapping[str, str]
    measured_on: str
    lines: tuple[Line, ...]
    """What keeps most comes first."""

    @property
    def title(self) -> str:
        """Say what they have in common."""
        tasks = ", ".join(self.tasks) if self.tasks else "no accuracy"
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.model}; {tasks}; {self.machine}; {packages}"


@dataclass(frozen=True)
class Comparison:
    """Runs in groups, and what could not be read."""

    groups: tuple[Group, ...]
    broken: Mapping[str, str]
    """Reasons by folder."""


def find_runs(places: Iterable[Path]) -> tuple[list[Path], dict[str, str]]:
    """Return the folders of runs: each place that holds a record, and of others every folder inside that does.

    Returns:
        The folders, and reasons by place where there is none.
    """
    found: dict[Path, None] = {}
    broken = {}
    for place in places:
        inside = [place] if (place / RECORD_FILE).exists() else sorted(path.parent for path in place.glob(f"*/{RECORD_FILE}"))
        if not inside:
            broken[str(place)] = f"no {RECORD_FILE} here, nor in a folder of it" if place.is_dir() else "no such folder"
        found |= dict.fromkeys(inside)
    return list(found), broken


def read_records(places: Sequence[Path]) -> tuple[dict[Path, Record], dict[str, str]]:
    """Read the records of runs, or of all runs in folders.

    Returns:
        The records by folder, and by place why others could not be read.

    Raises:
        UserError: there is not one readable record.
    """
    folders, broken = find_runs(places)
    records = {}
    for folder in folders:
        try:
            records[folder] = Record.read(folder)
        except UserError as error:
            broken[str(folder)] = error.message
    if not records:
        reasons = "; ".join(f"{place}: {reason}" for place, reason in broken.items())
        raise UserError(f"nothing to compare: {reasons}", "compress run RECIPE writes a record under results/")
    return records, broken


def compare(places: Sequence[Path]) -> Comparison:
    """Compare runs, given their folders or folders that hold these; raises as `read_records` does."""
    records, broken = read_records(places)
    return Comparison(grouped(records.values()), broken)


def grouped(records: Iterable[Record]) -> tuple[Group, ...]:
    """Put runs that may be compared together, largest group first."""
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
    """Return what has to be the same for two runs' numbers to stand side by side."""
    tasks = [[task.task, task.data, task.prompts] for task in record.tasks]
    return [record.model.name, record.model.fingerprint, tasks, _machine(record), _versions(record), record.measured_on]


def _machine(record: Record) -> str:
    machine = record.machine
    special = [name for name in machine.instructions if name != "avx2"]
    return machine.gpu or f"{machine.cores} cores of {machine.cpu}" + (f" ({', '.join(special)})" if special else "")


def _versions(record: Record) -> dict[str, str]:
    return {name: record.versions[name] for name in DECISIVE if name in record.versions}


def line_of(record: Record) -> Line:
    """Return what is compared of a record."""
    variant = record.row("variant")
    fidelity, speed = record.fidelity or {}, variant.speed
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
        cosine=fidelity.get("cosine_mean"),
        overlap=fidelity.get("overlap_at_10"),
        speedup=next(iter(variant.speedup.values()), None),
        texts_per_second=speed["texts_per_second"] if speed else None,
        latency_ms=speed["latency_p50_ms"] if speed else None,
        peak_bytes=(speed["gpu_peak_bytes"] if record.machine.gpu else speed["peak_bytes"]) if speed else None,
    )


def optimal(lines: Sequence[Line]) -> list[Line]:
    """Mark the Pareto-optimal ones: among runs that were scored, those that no other equals in everything and beats in something.

    A run that was not timed is beaten by what keeps more and is smaller; it beats none that was.
    """

    def beats(one: Line, other: Line) -> bool:
        if one.kept is None or other.kept is None or (one.speedup is None and other.speedup is not None):
            return False
        pairs: list[tuple[float, float]] = [(one.kept, other.kept), (-one.bytes, -other.bytes)]
        if one.speedup is not None and other.speedup is not None:
            same = abs(one.speedup / other.speedup - 1) < SAME_SPEED
            pairs.append((0, 0) if same else (one.speedup, other.speedup))
        return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)

    return [
        Line(**{**asdict(line), "optimal": line.kept is not None and not any(beats(other, line) for other in lines)})
        for line in lines
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f} %"


COLUMNS: Mapping[str, Callable[[Line], str]] = {
    "": lambda line: "*" if line.optimal else "",
    "recipe": lambda line: line.recipe,
    "weights x activations": lambda line: f"{line.weights} x {line.activations}",
    "runtime": lambda line: line.runtime,
    "kept": lambda line: _share(line.kept),
    "95 % interval": lambda line: "" if line.low is None or line.high is None else f"{100 * line.low:.2f} to {100 * line.high:.2f}",
    "verdict": lambda line: line.verdict or "",
    "tasks regressed": lambda line: ", ".join(line.regressed),
    "cosine": lambda line: "" if line.cosine is None else f"{line.cosine:.4f}",
    "file": lambda line: gigabytes(line.bytes),
    "of half": lambda line: f"{line.size:.2f}",
    "faster": lambda line: "" if line.speedup is None else f"{line.speedup:.2f}x",
    "p50 ms": lambda line: "" if line.latency_ms is None else f"{line.latency_ms:.1f}",
    "peak memory": lambda line: "" if line.peak_bytes is None else gigabytes(line.peak_bytes),
    "run": lambda line: line.run,
}
"""The columns of a table for people, and what each shows of a run."""


LEGEND = """\
Made by `compress compare --format markdown`. A table holds what is comparable: one model, tasks, machine and set of packages.
`*`: no other run of the table keeps as much, is as small and as fast, and better in one of these (speed within 3 % is not told
apart). Kept: mean score over the baseline's, with its 95 % interval. Faster: throughput over that of the first baseline, float32
on a CPU, float16 on a GPU."""
ONLY_WIDE = ("weights x activations", "tasks regressed", "of half", "p50 ms", "run")
"""Those that a terminal has no room for."""


def as_markdown(found: Comparison) -> str:
    """Write a table of each group in Markdown."""
    parts = ["# Runs side by side", LEGEND]
    for group in found.groups:
        head = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)
        rows = ("| " + " | ".join(show(line) for show in COLUMNS.values()) + " |" for line in group.lines)
        parts.append("\n".join([f"**{group.title}**", "", head, *rows]))
    parts += [f"Not read: {place}: {reason}" for place, reason in found.broken.items()]
    return "\n\n".join(parts) + "\n"


def as_csv(found: Comparison) -> str:
    """Write a row of each run, with what its group has in common in front."""
    written = io.StringIO()
    columns = ("group", "model", "tasks", "machine", *Line.__dataclass_fields__)
    writer = csv.DictWriter(written, columns, lineterminator="\n")
    writer.writeheader()
    for number, group in enumerate(found.groups):
        common = {"group": number, "model": group.model, "tasks": " ".join(group.tasks), "machine": group.machine}
        for line in group.lines:
            writer.writerow(common | asdict(line) | {"regressed": " ".join(line.regressed)})
    return written.getvalue()


def as_json(found: Comparison) -> str:
    """Write everything."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"


def as_table(found: Comparison) -> str:
    """Write a table of each group for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = {name: show for name, show in COLUMNS.items() if name not in ONLY_WIDE}
    console = Console(width=WIDTH, highlight=False, file=io.StringIO())
    for group in found.groups:
        table = Table(title=group.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in shown:
            table.add_column(name, justify="left" if name in ("", "recipe", "runtime", "verdict") else "right", no_wrap=True)
        for line in group.lines:
            table.add_row(*(show(line) for show in shown.values()))
        console.print(table)
    if any(line.optimal for group in found.groups for line in group.lines):
        console.print("* no other run of its table keeps as much, is as small and as fast, and better in one of these")
    for place, reason in found.broken.items():
        console.print(f"not read: {place}: {reason}", soft_wrap=True)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def as_svg(found: Comparison) -> str:
    """Draw what is kept against speed and against size, a row for each group with more than one scored run.

    Raises:
        UserError: there is no such group.
    """
    rows = [_panels(group) for group in found.groups if sum(line.kept is not None for line in group.lines) > 1]
    if not rows:
        raise UserError("nothing to draw: no two runs that may stand side by side were scored", "the other formats show the rest")
    return figure(rows)


def _panels(group: Group) -> list[Panel]:
    scored = [line for line in group.lines if line.kept is not None]
    title = f"{group.model}, {len(group.tasks)} tasks, {group.machine.partition(' (')[0]}"
    against: list[tuple[str, Callable[[Line], float | None]]] = [
        ("throughput over the first baseline's", lambda line: line.speedup),
        ("file, MB", lambda line: line.bytes / 1e6),
    ]
    panels = []
    for label, value in against:
        points = [
            Point(line.recipe, x, 100 * line.kept, line.optimal)
            for line in scored
            if line.kept is not None and (x := value(line)) is not None
        ]
        if points:
            panels.append(Panel(title, label, "mean score kept, %", points))
    return panels


FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "svg": as_svg,
    "csv": as_csv,
    "json": as_json,
}


def written(found: Comparison, format: str) -> str:
    """Write a comparison in a format.

    Raises:
        UserError: the format is not known.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not known", nearest(format, FORMATS))
    return FORMATS[format](found)
