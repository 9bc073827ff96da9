"""Tile sizes of the products: measured ones by shape from `tiles.json`, which benchmarks/gpu/tune.py writes, and defaults."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Tile:
    """How a product is cut: a program computes `rows` x `outputs` results, `inputs` at a time."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    descriptors: bool = False
    """Whether tiles are copied by the tensor memory accelerator (compute capability 9.0 and later)."""


# By number of tokens, each up to its key. Few tokens: small tiles, so that every multiprocessor reads some of the weight.
DEFAULTS = {
    "int8": {
        32: Tile(32, 32, 256, 4, 4),
        256: Tile(64, 64, 128, 4, 4),
        1024: Tile(128, 128, 128, 8, 3),
        None: Tile(128, 256, 128, 8, 3),
    },
    "weights": {16: Tile(16, 16, 128, 4, 4), None: Tile(64, 32, 128, 4, 3)},
}
"""Tiles for shapes that were not measured, by kernel."""


@functools.cache
def _measured() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((resources.files(__package__) / "tiles.json").read_text(encoding="utf-8"))["tiles"]
    return entries


@functools.lru_cache(4096)
def tile_for(kernel: str, rows: int, outputs: int, inputs: int) -> Tile:
    """Return the tile of a product of [rows, inputs] and [outputs, inputs]; `kernel`: `int8` or `weights`.

    A measured tile serves up to the number of rows it was measured with; above the largest of these, the largest serves.
    """
    fitting = [entry for entry in _measured() if (entry["kernel"], entry["outputs"], entry["inputs"]) == (kernel, outputs, inputs)]
    if fitting:
        above = [entry for entry in fitting if entry["tokens"] >= rows]
        chosen = min(above, key=lambda entry: entry["tokens"]) if above else max(fitting, key=lambda entry: entry["tokens"])
        return Tile(**chosen["tile"])
    return next(tile for limit, tile in DEFAULTS[kernel].items() if limit is None or rows <= limit)


def entry(kernel: str, tokens: int, outputs: int, inputs: int, tile: Tile) -> dict[str, Any]:
    """Return an entry of `tiles.json`."""
    return {"kernel": kernel, "tokens": tokens, "outputs": outputs, "inputs": inputs, "tile": asdict(tile)}
