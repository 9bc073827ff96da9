"""A record on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compress.measure.statistics import Interval
from compress.memory import gigabytes
from compress.record import Record

WIDTH = 120  # fixed, so that what is quoted looks the same wherever it was printed


def print_record(record: Record, console: Console | None = None) -> None:
    """Print tasks, fidelity, speed, memory, size and verdict."""
    console = console or Console(width=WIDTH, highlight=False)
    if record.model.weights == "random":
        console.print(f"{record.run}: random weights, so nothing is said of accuracy", soft_wrap=True)
    if record.tasks:
        console.print(_tasks(record))
        if any(task.index for task in record.tasks):
            console.print(_index(record))
    if record.fidelity:
        console.print(_fidelity(record.fidelity), soft_wrap=True)
    console.print(_rows(record))
    for gate in record.gates:
        bound = "at most" if gate.name == "size_ratio" else "at least"
        console.print(f"gate {gate.name}: {gate.value:.4f}, {bound} {gate.bound:g} wanted: {'kept' if gate.kept else 'MISSED'}")
    console.print(f"verdict: {record.verdict}", soft_wrap=True)


def _tasks(record: Record) -> Table:
    table = Table(
        title=f"{record.run}\naccuracy against {record.baseline.split(':')[0]}, scores x 100",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("task")
    table.add_column("metric")
    for heading in ("baseline", "variant", "delta", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for task in record.tasks:
        scores = (f"{100 * score:.2f}" for score in (task.baseline, task.variant))
        table.add_row(task.task, task.metric, *scores, f"{100 * task.delta:+.2f}", *_judged(task.interval))
    means = [float(np.mean(scores)) for scores in zip(*((task.baseline, task.variant) for task in record.tasks), strict=True)]
    table.add_section()
    table.add_row(
        "mean", "", *(f"{100 * mean:.2f}" for mean in means), f"{100 * (means[1] - means[0]):+.2f}", *_judged(record.overall)
    )
    return table


def _judged(interval: Interval | None) -> tuple[str, str]:
    """Write an interval and its verdict."""
    if interval is None:
        return "-", ""
    more = f", {interval.more_examples:,} more examples would tell" if interval.more_examples else ""
    return f"{100 * interval.low:+.2f} to {100 * interval.high:+.2f}", f"{interval.verdict}{more}"


def _index(record: Record) -> Table:
    """Show retrieval across models: may the variant's queries search the vectors that the baseline wrote, and the reverse."""
    pairs = [pair for task in record.tasks for pair in task.index]
    table = Table(
        title="queries of one model on the other's index, scores x 100", title_justify="left", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("task")
    headings = ["baseline alone", "variant alone", *dict.fromkeys(pairs)]
    for heading in headings:
        table.add_column(heading, justify="right")
    for task in record.tasks:
        if task.index:
            scores = (task.baseline, task.variant, *(task.index[pair] for pair in headings[2:]))
            table.add_row(task.task, *(f"{100 * score:.2f}" for score in scores))
    return table


def _fidelity(agreement: Mapping[str, Any]) -> str:
    return (
        f"fidelity on {agreement['texts']} texts: cosine mean {agreement['cosine_mean']:.5f}, p1 {agreement['cosine_p1']:.5f}, "
        f"min {agreement['cosine_min']:.5f}; neighbour overlap@10 {agreement['overlap_at_10']:.3f}"
    )


def _rows(record: Record) -> Table:
    threads = record.rows[0].speed["threads"] if record.rows[0].speed else None
    measured = f"{record.measured_on}; {record.machine.gpu or record.machine.cpu}, {threads} threads" if threads else None
    table = Table(
        title=measured,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    baselines = [row.name for row in record.rows if row.role == "baseline"]
    table.add_column("", no_wrap=True)
    for heading in (
        "texts/s",
        "tokens/s",
        *(f"vs {name}" for name in baselines),
        "p50 ms",
        "p99 ms",
        "peak memory",
        "on disk",
    ):
        table.add_column(heading, justify="right")
    for row in record.rows:
        name = row.name if row.role == "baseline" else f"{row.weights} x {row.activations}"
        if row.speed is None:
            table.add_row(name, *("-" for _ in table.columns[2:]), gigabytes(row.size_bytes))
            continue
        speed = row.speed
        peak = speed["gpu_peak_bytes"] if record.machine.gpu else speed["peak_bytes"]
        table.add_row(
            name,
            f"{speed['texts_per_second']:.0f}",
            f"{speed['tokens_per_second']:,.0f}",
            *(f"{row.speedup[name]:.2f}x" if name in row.speedup else "1" for name in baselines),
            f"{speed['latency_p50_ms']:.1f}",
            f"{speed['latency_p99_ms']:.1f}",
            gigabytes(peak) if peak is not None else "?",
            gigabytes(row.size_bytes),
        )
    return table
