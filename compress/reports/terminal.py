"""Prints records and evaluations on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from compress.common.memory import gigabytes
from compress.measure.accuracy.statistics import Interval
from compress.measure.record import DepthRow, Record, TaskRow
from compress.measure.speed.timing import Speed
from compress.measure.vectors.fidelity import Fidelity

if TYPE_CHECKING:
    from compress.measure.evaluate import Evaluation

WIDTH = 120  # fixed, so that quoted output looks the same wherever it was printed
NAME_WIDTH = 28  # names of rows wrap; the other cells are numbers, which do not


def print_record(record: Record, console: Console | None = None) -> None:
    """Print tasks, fidelity, speed, memory, size and verdict."""
    console = console or Console(width=WIDTH, highlight=False)
    if record.model.weights == "random":
        console.print(f"{record.run}: random weights, so accuracy means nothing", soft_wrap=True)
    if record.tasks:
        console.print(_tasks(record))
        if any(task.index for task in record.tasks):
            console.print(_index(record))
    if record.fidelity:
        console.print(_fidelity(record.fidelity), soft_wrap=True)
    if record.depths:
        console.print(_depths(record.depths))
    console.print(_rows(record))
    for row in record.rows:
        if row.speed is not None and row.speed.cards:
            console.print(_on_card(row.name, row.speed), soft_wrap=True)
    for gate in record.gates:
        bound = "at most" if gate.name == "size_ratio" else "at least"
        console.print(f"gate {gate.name}: {gate.value:.4f}, {bound} {gate.bound:g} wanted: {'kept' if gate.kept else 'MISSED'}")
    console.print(f"verdict: {record.verdict}", soft_wrap=True)


def _tasks(record: Record) -> Table:
    title = f"{record.run}\naccuracy against {record.baseline.split(':')[0]}, scores x 100"
    return tasks_table(title, record.tasks, record.overall)


def _depths(rows: Sequence[DepthRow]) -> Table:
    """Return a table of what a variant keeps at each depth to which it can be cut."""
    table = Table(title="cut to its first blocks (compress export --depth)", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("depth", "MB", "kept", "95 % interval", "cosine", "overlap@10"):
        table.add_column(heading, justify="right")
    for row in rows:
        kept = "-" if row.retained is None else f"{100 * row.retained:.2f} %"
        vectors = ((row.cosine_mean, 4), (row.overlap_at_10, 3))
        shown = ("-" if value is None else f"{value:.{digits}f}" for value, digits in vectors)
        table.add_row(str(row.depth), f"{row.size_bytes / 1e6:.1f}", kept, str(row.overall or "-"), *shown)
    return table


def tasks_table(
    title: str, tasks: Sequence[TaskRow], overall: Interval | None, names: tuple[str, str] = ("baseline", "variant")
) -> Table:
    """Return a table of two models' scores on tasks, with the difference, its interval and the verdict."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    table.add_column("metric")
    for heading in (*names, "delta", "95 % interval"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for task in tasks:
        scores = (f"{100 * score:.2f}" for score in (task.baseline, task.variant))
        table.add_row(task.task, task.metric, *scores, f"{100 * task.delta:+.2f}", *_judged(task.interval))
    means = [float(np.mean(scores)) for scores in zip(*((task.baseline, task.variant) for task in tasks), strict=True)]
    table.add_section()
    table.add_row("mean", "", *(f"{100 * mean:.2f}" for mean in means), f"{100 * (means[1] - means[0]):+.2f}", *_judged(overall))
    return table


def print_alignment(record: Record, console: Console | None = None) -> None:
    """Print what a model's queries find in another model's index, and whether it may be kept."""
    console = console or Console(width=WIDTH, highlight=False)
    found = record.alignment
    assert found is not None
    name = record.model.name
    title = f"nDCG and the like x 100 with 95 % intervals; old: {found.to}, new: {name}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for heading in ("old on old", "new on old", "kept %", "new on new", "% of old"):
        table.add_column(heading, justify="right")
    for task in found.tasks:
        cells = (task.old_on_old, task.new_on_old, task.kept, task.new_on_new, task.again)
        table.add_row(task.task, *(cell.percent() for cell in cells))
    if len(found.tasks) > 1:
        table.add_section()
        table.add_row("mean", "", "", found.kept.percent(), "", found.again.percent())
    console.print(table)
    console.print(record.verdict, soft_wrap=True)


def print_evaluation(found: Evaluation, console: Console | None = None) -> None:
    """Print a model's scores, alone or next to another model's."""
    console = console or Console(width=WIDTH, highlight=False)
    if found.against is not None:
        title = f"{found.model} against {found.against}, scores x 100"
        console.print(tasks_table(title, found.tasks, found.overall, ("other", "model")))
    else:
        console.print(_alone(found))
    _print_details(found, console)


def _alone(found: Evaluation) -> Table:
    table = Table(title=f"{found.model}, scores x 100", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("task", "type", "metric"):
        table.add_column(heading)
    table.add_column("score", justify="right")
    for task in found.tasks:
        table.add_row(task.task, task.type, task.metric, f"{100 * task.variant:.2f}")
    table.add_section()
    table.add_row("mean", "", "", f"{100 * float(np.mean([task.variant for task in found.tasks])):.2f}")
    return table


def _print_details(found: Evaluation, console: Console) -> None:
    for task, buckets in found.lengths.items():
        console.print(f"{task} by the tokens of the document (scores x 100):")
        for bucket in buckets:
            span = f"up to {bucket.up_to:,}" if bucket.up_to else "longer"
            console.print(f"  {span:14} {100 * bucket.score:6.2f}  {bucket.queries:,} queries")
    if found.vector_formats:
        console.print(_vector_formats(found))


def _vector_formats(found: Evaluation) -> Table:
    """Return a table of what retrieval loses with vectors stored in fewer bytes."""
    table = Table(title=f"vectors of {found.model} stored in fewer bytes, scores x 100", title_justify="left", box=SIMPLE_HEAD)
    tasks = list(found.vector_formats[0].scores)
    table.add_column("output")
    for heading in ("dimensions", "GB per million", *(part for task in tasks for part in (task, "delta", "95 % interval"))):
        table.add_column(heading, justify="right")
    whole = {task.task: task.variant for task in found.tasks}
    for row in found.vector_formats:
        cells = []
        for task in tasks:
            interval = row.intervals.get(task)
            span = str(interval or "-")
            cells += [f"{100 * row.scores[task]:.2f}", f"{100 * (row.scores[task] - whole[task]):+.2f}", span]
        table.add_row(row.format, str(row.dimensions), f"{row.bytes_per_million / 1e9:.3f}", *cells)
    return table


def _judged(interval: Interval | None) -> tuple[str, str]:
    """Format an interval and its verdict."""
    if interval is None:
        return "-", ""
    more = f", {interval.more_examples:,} more examples would tell" if interval.more_examples else ""
    return str(interval), f"{interval.verdict}{more}"


def _index(record: Record) -> Table:
    """Return a table of retrieval across models: the variant's queries on the baseline's index, and the reverse."""
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


def _fidelity(agreement: Fidelity) -> str:
    cosines = "vectors of another width"
    if agreement.cosine_mean is not None:
        cosines = f"cosine mean {agreement.cosine_mean:.5f}, p1 {agreement.cosine_p1:.5f}, min {agreement.cosine_min:.5f}"
    far, ranks = agreement.overlap_at_100, agreement.similarity_spearman
    return (
        f"fidelity on {agreement.texts} texts: {cosines}; neighbour overlap@10 {agreement.overlap_at_10:.3f}"
        + (f", @100 {far:.3f}" if far is not None else "")
        + (f"; rank correlation of similarities {ranks:.4f}" if ranks else "")
    )


def _on_card(name: str, speed: Speed) -> str:
    """Say how an embedder ran on a GPU, and at which clocks."""
    card = speed.cards[-1]
    clocks = [each.clock_mhz for each in speed.cards if each.clock_mhz is not None]
    said = [f"{name}: {speed.batching} batches", f"single texts by {speed.small_requests}"]
    said += [card.name, f"driver {card.driver or '?'}"]
    if clocks:
        said.append(f"{min(clocks):.0f} to {max(clocks):.0f} MHz of {card.most_clock_mhz or 0:.0f}")
    if speed.ids_seconds:
        said.append(f"{median(speed.ids_seconds) / median(speed.seconds):.0%} of the time is from token ids to vectors")
    return "; ".join(said)


def _rows(record: Record) -> Table:
    threads = record.rows[0].speed.threads if record.rows[0].speed else None
    measured = f"{record.measured_on}; {record.machine.gpu or record.machine.cpu}, {threads} threads" if threads else None
    table = Table(
        title=measured,
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    baselines = [row.name for row in record.rows if row.role == "baseline"]
    table.add_column("", max_width=NAME_WIDTH)
    for heading in (
        "texts/s",
        "tokens/s",
        *(f"vs {name}" for name in baselines),
        "p50 ms",
        "p99 ms",
        "peak memory",
        "on disk",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in record.rows:
        name = row.name if row.role == "baseline" else f"{row.weights} x {row.activations}"
        if row.speed is None:
            table.add_row(name, *("-" for _ in table.columns[2:]), gigabytes(row.size_bytes))
            continue
        speed = row.speed
        peak = speed.gpu_peak_bytes if record.machine.gpu else speed.peak_bytes
        table.add_row(
            name,
            f"{speed.texts_per_second:.0f}",
            f"{speed.tokens_per_second:,.0f}",
            *(f"{row.speedup[name]:.2f}x" if name in row.speedup else "1" for name in baselines),
            f"{speed.latency_p50_ms:.1f}",
            f"{speed.latency_p99_ms:.1f}",
            gigabytes(peak) if peak is not None else "?",
            gigabytes(row.size_bytes),
        )
    return table
