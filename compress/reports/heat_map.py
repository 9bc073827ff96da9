"""Draws a sensitivity as a heat map, blocks by kinds of layers: in the terminal and as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.measure.sensitivity import GroupScores, Sensitivity
from compress.reports.terminal import WIDTH

SHADES = ("#f7fbff", "#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#084594")
"""From the smallest loss to the largest (ColorBrewer's Blues, which are told apart without colour vision)."""
DARK_FROM = 4
"""Index of the first shade on which text is white."""
CELL_WIDTH, CELL_HEIGHT, MARGIN, LABEL = 62, 20, 16, 44


def rows_of(record: Sensitivity) -> list[list[GroupScores]]:
    """Return the groups line by line: those of each block, then those outside of the blocks together."""
    blocks = sorted({group.block for group in record.groups if group.block is not None})
    rows = [[group for group in record.groups if group.block == block] for block in blocks]
    outside = [group for group in record.groups if group.block is None]
    return [*rows, outside] if outside else rows


def kinds_of(record: Sensitivity, choice: str) -> list[str]:
    """Return the kinds of layers inside blocks that a choice was scored for."""
    return list(dict.fromkeys(group.kind for group in record.groups if group.block is not None and choice in group.losses))


def shown_choices(record: Sensitivity) -> list[str]:
    """Return the choices that cost anything."""
    return [choice for choice in record.choices if any(group.losses.get(choice) for group in record.groups)]


def shade(loss: float, ends: tuple[float, float]) -> int:
    """Return the index of a loss's shade, on a scale of logarithms between two ends."""
    if loss <= 0:
        return 0
    low, high = (math.log(max(end, 1e-12)) for end in ends)
    place = (math.log(loss) - low) / max(high - low, 1e-12)
    return min(len(SHADES) - 1, max(0, int(place * len(SHADES))))


def ends_of(record: Sensitivity, choices: Sequence[str]) -> tuple[float, float]:
    """Return the smallest and the largest loss of some choices."""
    losses = [loss for group in record.groups for choice in choices if (loss := group.losses.get(choice, 0.0)) > 0]
    return (min(losses), max(losses)) if losses else (1e-12, 1.0)


def print_heat_map(record: Sensitivity, choices: Sequence[str] = (), console: Console | None = None) -> None:
    """Print one map for each of the choices; without any, for the one in the middle by its loss. Then the sum for every choice."""
    console = console or Console(width=WIDTH, highlight=False)
    everything = shown_choices(record)
    wanted = [choice for choice in everything if choice in choices] or _middle(record, everything)
    ends = ends_of(record, wanted)
    for choice in wanted:
        console.print(_map(record, choice, ends))
    console.print(_sums(record, everything))
    outside = [group for group in record.groups if group.block is None]
    for group in outside:
        said = ", ".join(f"{choice} {group.losses[choice]:.2e}" for choice in everything if choice in group.losses)
        console.print(f"{group.name}: {said}", soft_wrap=True)
    console.print(
        f"loss: 1 - cosine of the vectors to first order, all other layers as they are; {record.scored} texts, "
        f"{record.seconds:.0f} s, by {record.how}",
        soft_wrap=True,
    )


def _middle(record: Sensitivity, choices: Sequence[str]) -> list[str]:
    """Return the choice whose losses inside blocks have the middle sum."""
    inside = [choice for choice in choices if kinds_of(record, choice)]
    ranked = sorted(inside, key=lambda choice: _sum(record, choice))
    return [ranked[len(ranked) // 2]] if ranked else []


def _sum(record: Sensitivity, choice: str) -> float:
    return sum(group.losses.get(choice, 0.0) for group in record.groups if group.block is not None)


def _map(record: Sensitivity, choice: str, ends: tuple[float, float]) -> Table:
    table = Table(title=f"{record.model}: loss of {choice}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    kinds = kinds_of(record, choice)
    table.add_column("block", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for row in rows_of(record):
        losses = {group.kind: group.losses[choice] for group in row if group.block is not None and choice in group.losses}
        if losses:
            cells = [_cell(losses[kind], ends) if kind in losses else Text("") for kind in kinds]
            table.add_row(str(row[0].block), *cells)
    return table


def _cell(loss: float, ends: tuple[float, float]) -> Text:
    place = shade(loss, ends)
    return Text(f" {loss:.1e} ", style=f"{'white' if place >= DARK_FROM else 'black'} on {SHADES[place]}")


def _sums(record: Sensitivity, choices: Sequence[str]) -> Table:
    """Return a table of the sum over all blocks, for every choice and kind."""
    table = Table(title="sum over the blocks", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    kinds = list(dict.fromkeys(group.kind for group in record.groups if group.block is not None))
    table.add_column("choice")
    for kind in kinds:
        table.add_column(kind, justify="right")
    for choice in choices:
        sums = [
            [
                group.losses[choice]
                for group in record.groups
                if group.block is not None and group.kind == kind and choice in group.losses
            ]
            for kind in kinds
        ]
        if any(sums):
            table.add_row(choice, *(f"{sum(losses):.2e}" if losses else "" for losses in sums))
    return table


def svg(record: Sensitivity) -> str:
    """Return a drawing with one map for each choice, blocks downwards and kinds of layers across; all share one scale."""
    choices = [choice for choice in shown_choices(record) if kinds_of(record, choice)]
    ends = ends_of(record, choices)
    panels, x, tallest = [], MARGIN, 0
    rows = [row for row in rows_of(record) if row[0].block is not None]
    for choice in choices:
        kinds = kinds_of(record, choice)
        panels.append(_panel(rows, choice, kinds, ends, x))
        x += LABEL + len(kinds) * CELL_WIDTH + MARGIN
        tallest = max(tallest, len(rows))
    height = 3 * MARGIN + 2 * CELL_HEIGHT + tallest * CELL_HEIGHT + 2 * CELL_HEIGHT
    legend = _legend(ends, height - MARGIN - CELL_HEIGHT)
    title = escape(f"{record.model}: loss (1 - cosine to first order) of each choice for each group of layers")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height}" font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/><text x="{MARGIN}" y="{MARGIN}" font-size="13">{title}</text>'
        f"{''.join(panels)}{legend}</svg>\n"
    )


def _panel(rows: Sequence[Sequence[GroupScores]], choice: str, kinds: Sequence[str], ends: tuple[float, float], x: int) -> str:
    top = MARGIN + CELL_HEIGHT
    made = [f'<text x="{x + LABEL}" y="{top}" font-weight="bold">{escape(choice)}</text>']
    for column, kind in enumerate(kinds):
        made.append(f'<text x="{x + LABEL + column * CELL_WIDTH + 3}" y="{top + CELL_HEIGHT - 5}">{escape(kind)}</text>')
    for line, row in enumerate(rows):
        y = top + CELL_HEIGHT + line * CELL_HEIGHT
        made.append(f'<text x="{x}" y="{y + 14}">{row[0].block}</text>')
        losses = {group.kind: group.losses[choice] for group in row if choice in group.losses}
        for column, kind in enumerate(kinds):
            if kind in losses:
                made.append(_square(losses[kind], ends, x + LABEL + column * CELL_WIDTH, y))
    return "".join(made)


def _square(loss: float, ends: tuple[float, float], x: int, y: int) -> str:
    place = shade(loss, ends)
    ink = "white" if place >= DARK_FROM else "black"
    return (
        f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" fill="{SHADES[place]}"/>'
        f'<text x="{x + 4}" y="{y + 14}" fill="{ink}">{loss:.1e}</text>'
    )


def _legend(ends: tuple[float, float], y: int) -> str:
    squares = "".join(
        f'<rect x="{MARGIN + LABEL + place * 24}" y="{y}" width="24" height="12" fill="{color}"/>'
        for place, color in enumerate(SHADES)
    )
    right = MARGIN + LABEL + 24 * len(SHADES) + 6
    return f'<text x="{MARGIN}" y="{y + 11}">{ends[0]:.0e}</text>{squares}<text x="{right}" y="{y + 11}">{ends[1]:.0e}</text>'
