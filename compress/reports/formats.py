"""Writes a comparison as a table, Markdown, CSV, JSON or SVG."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict

from compress.common.errors import UserError, nearest
from compress.common.lazy import attribute
from compress.common.memory import gigabytes
from compress.reports import FORMATS
from compress.reports.compare import WIDTH, Comparison, Group, Line
from compress.reports.plot import Panel, Point, figure

# Underscores and dashes inside words are none, and are everywhere in names.
_MARKUP = re.compile(r"([\\`*|\[\]]|(?<!\w)_|_(?!\w))")


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
"""Columns of the tables for people, and what each shows of a run."""

LEGEND = """\
Made by `compress compare --format markdown`. A table holds what is comparable: one model, tasks, machine and set of packages.
`*`: no other run of the table keeps as much, is as small and as fast, and better in one of these (speed within 3 % is not told
apart). Kept: mean score over the baseline's, with its 95 % interval. Faster: throughput over that of the first baseline, float32
on a CPU, float16 on a GPU."""

ONLY_WIDE = ("weights x activations", "tasks regressed", "of half", "p50 ms", "run")
"""Columns that do not fit on a terminal."""


def as_markdown(found: Comparison) -> str:
    """Return a Markdown table of each group."""
    parts = ["# Runs side by side", LEGEND]
    for group in found.groups:
        head = "| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS)
        rows = ("| " + " | ".join(_in_markdown(show(line)) for show in COLUMNS.values()) + " |" for line in group.lines)
        parts.append("\n".join([f"**{_in_markdown(group.title)}**", "", head, *rows]))
    parts += [f"Not read: {_in_markdown(place)}: {_in_markdown(reason)}" for place, reason in found.broken.items()]
    return "\n\n".join(parts) + "\n"


def _in_markdown(text: str) -> str:
    """Return a text as Markdown shows it as it is: no markup of a name is taken for the table's, and no line ends in it."""
    # The mark of runs that no other beats is a lone star; it begins nothing.
    return text if text == "*" else _MARKUP.sub(r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def as_csv(found: Comparison) -> str:
    """Return CSV with one row per run; what its group has in common comes first."""
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
    """Return everything as JSON."""
    return json.dumps(asdict(found), indent=1, ensure_ascii=False) + "\n"


def _printable(text: str) -> str:
    """Return a text in one line and without what a terminal takes for commands."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def as_table(found: Comparison) -> str:
    """Return a table of each group for the terminal, in plain text: it may be written to a file."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    shown = {name: show for name, show in COLUMNS.items() if name not in ONLY_WIDE}
    console = Console(width=WIDTH, highlight=False, file=io.StringIO(), force_terminal=False, color_system=None)
    for group in found.groups:
        table = Table(title=escape(_printable(group.title)), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name in shown:
            table.add_column(name, justify="left" if name in ("", "recipe", "runtime", "verdict") else "right", no_wrap=True)
        for line in group.lines:
            table.add_row(*(escape(_printable(show(line))) for show in shown.values()))
        console.print(table)
    if any(line.optimal for group in found.groups for line in group.lines):
        console.print("* no other run of its table keeps as much, is as small and as fast, and is better in one of these")
    for place, reason in found.broken.items():
        console.print(escape(_printable(f"not read: {place}: {reason}")), soft_wrap=True)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def as_svg(found: Comparison) -> str:
    """Plot the kept score against speed and against size, one row for each group with more than one scored run.

    Raises:
        UserError: there is no such group.
    """
    rows = [_panels(group) for group in found.groups if sum(line.kept is not None for line in group.lines) > 1]
    if not rows:
        raise UserError("nothing to plot: no two comparable runs were scored", "the other formats show all runs")
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


def written(found: Comparison, format: str) -> str:
    """Return a comparison in a format.

    Raises:
        UserError: the format is not known.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not known", nearest(format, FORMATS))
    write: Callable[[Comparison], str] = attribute(FORMATS[format])
    return write(found)
