"""A small scatter plot with a name at every point, as SVG: `python benchmarks/scatter.py quantization.json plot.svg`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 900, 560, 70, 55, 20
GLYPH, LINE, DOT = 6.3, 13, 4


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`."""
    rough = (high - low or abs(high) or 1.0) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first = math.floor(low / step)
    return [round(step * number, 10) for number in range(first, max(math.ceil(high / step), first + 1) + 1)]


def place(x: float, y: float, width: float, taken: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Return the nearest free box for a name of that width around a point; left, top, right, bottom."""
    for distance in range(DOT + 4, WIDTH, 6):
        for turn in range(16):
            across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
            left, top = x + across * (distance + width / 2) - width / 2, y + down * (distance + LINE / 2) - LINE / 2
            box = (left, top, left + width, top + LINE)
            inside = box[0] > LEFT and box[2] < WIDTH and box[1] > 0 and box[3] < HEIGHT - BOTTOM
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                return box
    raise ValueError("the plot is too full for another name")


def scatter(points: Sequence[tuple[str, float, float]], x_label: str, y_label: str, path: Path) -> None:
    """Draw named points (name, x, y); no name lies on another or on a point."""
    across, up = ticks(0, max(x for _, x, _ in points)), ticks(min(y for *_, y in points), max(y for *_, y in points))

    def at(x: float, y: float) -> tuple[float, float]:
        right, top = x / across[-1], (y - up[0]) / (up[-1] - up[0])
        return LEFT + right * (WIDTH - LEFT - EDGE), HEIGHT - BOTTOM - top * (HEIGHT - BOTTOM - EDGE)

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    for left, x in ((at(x, up[0])[0], x) for x in across):
        parts.append(f'<path d="M{left:.1f} {HEIGHT - BOTTOM}V{EDGE}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    for top, y in ((at(0, y)[1], y) for y in up):
        parts.append(f'<path d="M{LEFT} {top:.1f}H{WIDTH - EDGE}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{top + 4:.1f}" text-anchor="end">{y:g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>')
    dots = [at(x, y) for _, x, y in points]
    taken = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in dots]
    for (name, *_), (x, y) in zip(points, dots, strict=True):
        box = place(x, y, GLYPH * len(name), taken)
        taken.append(box)
        near_x, near_y = min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3])
        if math.hypot(near_x - x, near_y - y) > 3 * DOT:  # so far off that it is not plain whose name it is
            parts.append(f'<path d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}" stroke="#999"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{DOT}" fill="#1f5fa8"/>')
        start, anchor = (box[0], "start") if box[0] > x else (box[2], "end") if box[2] < x else ((box[0] + box[2]) / 2, "middle")
        parts.append(f'<text x="{start:.1f}" y="{box[3] - 3:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    path.write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")


def draw(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw speed against kept accuracy of the rows that have both."""
    points = [(str(row["name"]), float(str(row["ratio"])), float(str(row["kept"]))) for row in rows if row["ratio"] and row["kept"]]
    scatter(points, "texts/s, relative to sentence-transformers fp32", "score kept, %", path)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["rows"], Path(sys.argv[2]))
