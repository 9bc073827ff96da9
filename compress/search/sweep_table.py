"""The table at the end of a sweep, and the best run in words."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from compress.reports.compare import Line
from compress.search.sweep import Result, Swept

WIDTH = 140  # fixed, so that quoted output looks the same wherever it was printed


def print_sweep(found: Swept, console: Console | None = None) -> None:
    """Print a table for each model, the best run first, and which runs failed."""
    console = console or Console(width=WIDTH, highlight=False)
    for model in found.models:
        results = found.of(model)
        console.print(_table(model, results))
        for line in best_in_words(results, found.best):
            console.print(line, markup=False)
    for result in found.failed:
        reason = result.outcome.error.replace("\n", "; ")
        console.print(f"failed in round {result.round + 1}: {result.point.label} on {result.model}: {reason}", markup=False)


def _table(model: str, results: list[Result]) -> Table:
    table = Table(title=escape(model), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run")
    for heading in ("round", "kept %", "95 % interval", "MB", "of half", "speed", "cosine", "gates"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("folder", overflow="fold")
    for result in results:
        line = result.line
        assert line is not None
        table.add_row(
            escape(result.point.label),
            str(result.round + 1),
            "-" if line.kept is None else f"{100 * line.kept:.2f}",
            _interval(line),
            f"{line.bytes / 1e6:.2f}",
            f"{100 * line.size:.1f} %",
            "-" if line.speedup is None else f"{line.speedup:.2f}x",
            "-" if line.cosine is None else f"{line.cosine:.5f}",
            "missed" if result.missed else "",
            escape(result.run),
        )
    return table


def _interval(line: Line) -> str:
    return "-" if line.low is None or line.high is None else f"{100 * line.low:.2f} to {100 * line.high:.2f}"


def best_in_words(results: list[Result], asked: str) -> list[str]:
    """Return lines that name the best run, by what was asked, and those that its score does not tell from it."""
    best = results[0]
    assert best.line is not None
    said = [f"best by {asked}: {best.point.label} ({best.run})" + (", which misses gates as all do" if best.missed else "")]
    if asked == "kept" and best.line.low is not None:
        last = [one for one in results[1:] if one.round == best.round and one.line is not None and one.line.high is not None]
        near = [one.point.label for one in last if one.line is not None and (one.line.high or 0.0) >= best.line.low]
        said += [f"intervals overlap with that of {', '.join(near)}: these scores do not tell them apart"] if near else []
    return said
