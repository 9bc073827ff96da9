"""Scatter plots with names next to the points, as SVG. They need no library, and a README can show them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE, TOP = 600, 440, 60, 50, 18, 20
GLYPH, LINE, DOT = 6.3, 13, 4
FARTHEST = 30
"""Largest distance in pixels between an unmarked point and its name; without room that near, the name is left out."""
MARKED, OTHER = "#1f5fa8", "#a0a0a0"
Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True)
class Point:
    """A named point."""

    name: str
    x: float
    y: float
    marked: bool = True
    """Whether the point is in colour. Names of other points are drawn if there is room; a tooltip has them all."""


@dataclass(frozen=True)
class Panel:
    """Points on two axes; the horizontal axis starts at 0."""

    title: str
    x_label: str
    y_label: str
    points: Sequence[Point]


def figure(panels: Sequence[Sequence[Panel]]) -> str:
    """Return an SVG with rows of panels."""
    across, down = max(map(len, panels)), len(panels)
    parts = [f'<rect width="{across * WIDTH}" height="{down * HEIGHT}" fill="white"/>']
    for row, line in enumerate(panels):
        for column, panel in enumerate(line):
            parts += [f'<g transform="translate({column * WIDTH} {row * HEIGHT})">', *_drawn(panel), "</g>"]
    size = f'width="{across * WIDTH}" height="{down * HEIGHT}" viewBox="0 0 {across * WIDTH} {down * HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    return "\n".join([head, *parts, "</svg>\n"])


def _drawn(panel: Panel) -> Iterator[str]:
    """Yield the elements of a panel. No name covers another name or a point; a name without room is left out."""
    points = sorted((replace(point, name=printable(point.name)) for point in panel.points), key=lambda point: not point.marked)
    across, up = ticks(0, max(p.x for p in points)), ticks(min(p.y for p in points), max(p.y for p in points))

    def at(x: float, y: float) -> tuple[float, float]:
        right, top = x / across[-1], (y - up[0]) / (up[-1] - up[0])
        return LEFT + right * (WIDTH - LEFT - EDGE), HEIGHT - BOTTOM - top * (HEIGHT - BOTTOM - EDGE - TOP)

    for left, x in ((at(x, up[0])[0], x) for x in across):
        yield f'<path d="M{left:.1f} {HEIGHT - BOTTOM}V{EDGE + TOP}" stroke="#e3e3e3"/>'
        yield f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>'
    for top, y in ((at(0, y)[1], y) for y in up):
        yield f'<path d="M{LEFT} {top:.1f}H{WIDTH - EDGE}" stroke="#e3e3e3"/>'
        yield f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{y:g}</text>'
    yield f'<text x="{LEFT}" y="{EDGE}" font-size="13" font-weight="bold">{escape(printable(panel.title))}</text>'
    yield f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(panel.x_label)}</text>'
    yield f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(panel.y_label)}</text>'
    dots = [at(point.x, point.y) for point in points]
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    for point, (x, y) in zip(points, dots, strict=True):
        size, inside = (GLYPH * len(point.name), LINE), (LEFT, EDGE + TOP, WIDTH, HEIGHT - BOTTOM)
        box = place((x, y), size, taken, inside, WIDTH if point.marked else FARTHEST)
        if box is not None:
            taken.append(box)
            near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
            if math.hypot(near_x - x, near_y - y) > 3 * DOT:  # so far from its point that a line has to connect them
                yield f'<path d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}" stroke="#999"/>'
        about = f"<title>{escape(point.name)}: {point.x:g}, {point.y:g}</title>"
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" fill="{MARKED if point.marked else OTHER}">{about}</circle>'
        if box is not None:
            start, anchor = _anchored(x, box)
            colour = "" if point.marked else f' fill="{OTHER}"'
            yield f'<text x="{start:.1f}" y="{box[3] - 3:.1f}" text-anchor="{anchor}"{colour}>{escape(point.name)}</text>'


def printable(name: str) -> str:
    """Return a name without letters that XML does not have at all, not even escaped."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _anchored(x: float, box: Box) -> tuple[float, str]:
    if box[0] > x:
        return box[0], "start"
    return (box[2], "end") if box[2] < x else ((box[0] + box[2]) / 2, "middle")


def ticks(low: float, high: float, spaces: int = 6) -> list[float]:
    """Return round numbers from at most `low` to at least `high`, with about that many spaces; the axis spans at least 1."""
    rough = max(high - low, 1.0) / spaces
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first = math.floor(low / step)
    return [round(step * number, 10) for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


def place(at: tuple[float, float], size: tuple[float, float], taken: Sequence[Box], inside: Box, farthest: int) -> Box | None:
    """Return the nearest free box of a width and height for the name of a point; None if there is none within `farthest` pixels."""
    (x, y), (width, height) = at, size
    for distance in range(DOT + 4, farthest, 6):
        for turn in range(16):
            across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left, top = x + across * (distance + width / 2) - width / 2, y + down * (distance + height / 2) - height / 2
            box = (left, top, left + width, top + height)
            within = box[0] > inside[0] and box[1] > inside[1] and box[2] < inside[2] and box[3] < inside[3]
            if within and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                return box
    return None
