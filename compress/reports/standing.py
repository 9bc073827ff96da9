"""Where one run stands among those that it is comparable with: kept against speed and against size, as small SVGs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from compress.reports.plot import Box, Point, place, printable, ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 336, 270, 42, 14, 42, 42
LETTER, LINE, OWN, OTHER, CAP = 6.4, 14, 4, 3, 5
"""Width and height of a letter of a name, radii of the run's and of another point, and half the width of an interval's end."""
EDGE, HEAD, SPACES = 0.06, 0.14, 7
"""Space around the points and, for names, above them, as shares of what they span; and about how many spaces an axis has."""
NEAR = 26
"""Largest distance in pixels between a point that no other beats and its name; without room that near, the name is left out."""
STYLE = """\
text{font:12px system-ui,sans-serif;fill:#4a5361}.back{fill:#fff}.strong{font-weight:600;fill:#1b212b}
.grid{stroke:#e7eaee}.same{stroke:#8a94a3;stroke-dasharray:4 3}.others{stroke:#c3cad3;stroke-width:6;stroke-linecap:round}
.best{stroke:#6d7889}.own{fill:#1f5fa8}.bar{stroke:#1f5fa8;stroke-width:2;fill:none}
.name{fill:#5b6575;font-size:11px}.mine{fill:#1f5fa8;font-weight:600}
.name,.mine{paint-order:stroke;stroke:#fff;stroke-width:3px;stroke-linejoin:round}
@media (prefers-color-scheme:dark){text{fill:#aab4c2}.back{fill:#14181f}.strong{fill:#eef1f5}.grid{stroke:#262c36}
.same{stroke:#7d8796}.others{stroke:#454e5c}.best{stroke:#9aa5b5}.own{fill:#6db0ff}.bar{stroke:#6db0ff}
.name{fill:#9aa5b5}.mine{fill:#6db0ff}.name,.mine{stroke:#14181f}}"""
"""The picture has a background of its own in both schemes: a page's may differ from the one that the reader's system asks for."""


@dataclass(frozen=True)
class Standing:
    """A run among those that it is comparable with. The vertical axis is what is kept, in percent; the other starts at 0."""

    title: str
    x_label: str
    run: Point
    low: float
    """Lower end of the interval of what the run keeps, in percent."""
    high: float
    """Upper end of it."""
    others: Sequence[Point]
    """The other runs; marked are those that no run beats."""
    unchanged: float
    """Where the unchanged model lies on the horizontal axis."""


@dataclass(frozen=True)
class _Axes:
    """Where a value lies in the picture, and the ticks."""

    right: float
    low: float
    high: float

    def x(self, value: float) -> float:
        return LEFT + value / self.right * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)

    def across(self) -> list[float]:
        return [value for value in ticks(0, self.right, SPACES) if value <= self.right]

    def up(self) -> list[float]:
        return [value for value in ticks(self.low, self.high, SPACES) if self.low <= value <= self.high]


def standing_svg(panels: Sequence[Standing]) -> str:
    """Return an SVG of panels below each other, readable on light and dark pages and at the width of a phone."""
    height = HEIGHT * len(panels)
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<style>{STYLE}</style>"]
    parts.append(f'<rect class="back" width="{WIDTH}" height="{height}" rx="6"/>')
    for row, panel in enumerate(panels):
        parts += [f'<g transform="translate(0 {row * HEIGHT})">', *_drawn(panel), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _drawn(panel: Standing) -> Iterator[str]:
    """Yield the elements of a panel: axes, the unchanged model's lines, the other runs, the run with its interval, then names."""
    points = (panel.run, *panel.others)
    heights = (panel.low, panel.high, 100.0, *(point.y for point in points))
    most, span = max(panel.unchanged, *(point.x for point in points)), max(max(heights) - min(heights), 1.0)
    axes = _Axes((1 + EDGE) * most, min(heights) - EDGE * span, max(heights) + HEAD * span)
    yield from _axes(panel, axes)
    yield f'<path class="others" d="{_dots(panel.others, axes, marked=False)}"/>'
    yield f'<path class="others best" d="{_dots(panel.others, axes, marked=True)}"/>'
    x, y, top, bottom = axes.x(panel.run.x), axes.y(panel.run.y), axes.y(panel.high), axes.y(panel.low)
    ends = f"M{x - CAP:.1f} {top:.1f}h{2 * CAP}m0 {bottom - top:.1f}h-{2 * CAP}"
    yield f'<path class="bar" d="M{x:.1f} {top:.1f}V{bottom:.1f}{ends}"/>'
    yield f'<circle class="own" cx="{x:.1f}" cy="{y:.1f}" r="{OWN}"/>'
    yield from _names(panel, axes)


def _axes(panel: Standing, axes: _Axes) -> Iterator[str]:
    """Yield titles, grid and numbers, and dashed lines where the unchanged model lies."""
    yield f'<text class="strong" x="12" y="20">{escape(printable(panel.title))}</text>'
    yield f'<text x="12" y="{TOP - 9}">score kept, %</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{escape(panel.x_label)}</text>'
    floor = HEIGHT - BOTTOM
    for value in axes.across():
        yield f'<path class="grid" d="M{axes.x(value):.1f} {floor}V{TOP}"/>'
        yield f'<text x="{axes.x(value):.1f}" y="{floor + 16}" text-anchor="middle">{value:g}</text>'
    for value in axes.up():
        yield f'<path class="grid" d="M{LEFT} {axes.y(value):.1f}H{WIDTH - RIGHT}"/>'
        yield f'<text x="{LEFT - 7}" y="{axes.y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<path class="same" d="M{LEFT} {axes.y(100):.1f}H{WIDTH - RIGHT}M{axes.x(panel.unchanged):.1f} {floor}V{TOP}"/>'


def _dots(points: Sequence[Point], axes: _Axes, *, marked: bool) -> str:
    """Return a path of dots: lines of no length with round ends."""
    return "".join(f"M{axes.x(point.x):.1f} {axes.y(point.y):.1f}h.01" for point in points if point.marked == marked)


def _names(panel: Standing, axes: _Axes) -> Iterator[str]:
    """Yield the run's name and, where there is room, those of the runs that no other beats."""
    x, y = axes.x(panel.run.x), axes.y(panel.run.y)
    taken: list[Box] = [(x - OWN, min(axes.y(panel.high), y - OWN), x + OWN, max(axes.y(panel.low), y + OWN))]
    marked = [point for point in panel.others if point.marked]
    taken += [(axes.x(p.x) - OTHER, axes.y(p.y) - OTHER, axes.x(p.x) + OTHER, axes.y(p.y) + OTHER) for p in marked]
    inside = (LEFT, TOP - 2, WIDTH - 2, HEIGHT - BOTTOM)
    for point in (panel.run, *sorted(marked, key=lambda point: -point.y)):
        own = point is panel.run
        name = printable(point.name)
        found = place((axes.x(point.x), axes.y(point.y)), (LETTER * len(name), LINE), taken, inside, WIDTH if own else NEAR)
        if found is not None and (own or _clear(axes, point, found, marked)):
            taken.append(found)
            middle = (found[0] + found[2]) / 2
            kind = "mine" if own else "name"
            yield f'<text class="{kind}" x="{middle:.1f}" y="{found[3] - 3:.1f}" text-anchor="middle">{escape(name)}</text>'


def _clear(axes: _Axes, point: Point, name: Box, marked: Sequence[Point]) -> bool:
    """Whether a name is clearly nearer to its point than to any other that is named; points in one place count as one."""

    def apart(other: Point) -> float:
        x, y = axes.x(other.x), axes.y(other.y)
        return math.hypot(max(name[0] - x, x - name[2], 0.0), max(name[1] - y, y - name[3], 0.0))

    x, y = axes.x(point.x), axes.y(point.y)
    elsewhere = [other for other in marked if math.hypot(axes.x(other.x) - x, axes.y(other.y) - y) > 2 * OTHER]
    return all(apart(point) + 2 < apart(other) for other in elsewhere)
