"""Times tile sizes of the Triton products on this card and writes the fastest of each shape.

    python benchmarks/gpu/tune.py --to compress/layers/kernels/tiles.json --seconds 120

The shapes are NV-Embed-v2's, merged: query, key and value; output; gate and up; down. A tile that does not compile, or gives
another number than the reference, is left out. What the time does not reach keeps its default.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
from timing import in_turn  # noqa: E402

from compress.layers.kernels import available, failures  # noqa: E402
from compress.layers.kernels.tiles import Tile, entry  # noqa: E402

SHAPES = ((28_672, 4_096), (6_144, 4_096), (4_096, 14_336), (4_096, 4_096))
"""Outputs and inputs, those that take the longest first."""
TOKENS = (16_384, 2_048, 256, 32)
TILES = tuple(
    Tile(rows, outputs, inputs, warps, stages, descriptors)
    for descriptors in (False, True)
    for rows, outputs, inputs, warps, stages in (
        (128, 256, 128, 8, 3), (128, 256, 64, 8, 4), (128, 128, 128, 8, 3), (128, 128, 128, 4, 4), (256, 128, 128, 8, 3),
        (64, 256, 128, 8, 3), (64, 128, 128, 4, 4), (64, 64, 128, 4, 4), (32, 64, 256, 4, 4), (32, 32, 256, 4, 4),
    )
)  # fmt: skip


def fastest(
    tokens: int, outputs: int, inputs: int, device: torch.device, tiles: tuple[Tile, ...], until: float = math.inf
) -> dict[str, Any] | None:
    """Return the entry of the fastest tile for a product of int8; None: none is exact.

    `until`: the moment, by `time.monotonic`, after which no further tile is tried; each one is compiled first.
    """
    from compress.layers.kernels.products import int8_product

    draw = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randint(-127, 128, size, dtype=torch.int8, device=device, generator=draw)
        for size in ((tokens, inputs), (outputs, inputs))
    )
    row, column = (torch.rand((count,), device=device, generator=draw) for count in (tokens, outputs))
    some = slice(0, 16)
    sums = (x[some].double() @ weight.double().t()).float() if device.type == "cpu" else (x[some].float() @ weight.float().t())
    expected = sums * column * row[some, None]
    found: list[tuple[float, Tile]] = []
    for tile in tiles:
        if time.monotonic() > until:
            break
        try:
            made = int8_product(x, weight, row, column, None, torch.bfloat16, tile=tile)
            if not torch.allclose(made[some].float(), expected, rtol=1e-2):
                continue
            call = lambda tile=tile: int8_product(x, weight, row, column, None, torch.bfloat16, tile=tile)  # noqa: E731
            found.append((median(in_turn({"": call}, device, 5)[""]), tile))
        except failures():
            continue
    if not found:
        return None
    taken, tile = min(found, key=lambda one: one[0])
    return entry("int8", tokens, outputs, inputs, tile) | {"microseconds": round(1e6 * taken, 1)}


def main() -> int:
    """Tune until the time is over, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if not available(device.type):
        parser.error(f"Triton is not installed, or does not run on {device.type}")
    began, entries = time.monotonic(), []
    for tokens in TOKENS:
        for outputs, inputs in SHAPES:
            if time.monotonic() - began > arguments.seconds:
                break
            found = fastest(tokens, outputs, inputs, device, TILES, began + arguments.seconds)
            if found is not None:
                entries.append(found)
                print(json.dumps(found), flush=True)
                card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
                arguments.to.write_text(json.dumps({"card": card, "tiles": entries}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
