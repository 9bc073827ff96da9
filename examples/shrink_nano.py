"""Compress the built-in model and compare its vectors with the original's: offline, in seconds.

    python examples/shrink_nano.py

A recipe may be a file (`compress.run("recipes/int8.yaml")`) or, as here, made in Python.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

import compress
from compress.pipeline.recipe_file import parse_recipe

TEXTS = [
    "How do I reset my password?",
    "I forgot my password and cannot log in.",
    "The museum is closed on Mondays.",
]
RECIPE = {
    "name": "example",
    "model": "nano",
    "steps": [
        {"method": "rtn", "bits": 8},  # linear layers: int8 weights and int8 activations
        {"method": "embeddings", "bits": 8},  # token table: int8
    ],
}


def main(folder: Path) -> float:
    """Compress into `folder`, print what changed, and return the lowest cosine between old and new vectors."""
    original = compress.load("nano").encode(TEXTS)  # float32 [3, 384], unit length

    record = compress.run(parse_recipe(RECIPE), output=folder, compress_only=True)  # evaluates and times nothing
    smaller = compress.load(str(folder / record.run)).encode(TEXTS)

    before, after = 2 * record.model.parameters / 1e6, record.row("variant").size_bytes / 1e6  # MB, half precision and int8
    cosines = (original * smaller).sum(axis=1)
    print(f"size: {before:.1f} MB -> {after:.1f} MB")
    for text, cosine, similarity in zip(TEXTS, cosines, smaller @ smaller[0], strict=True):
        print(f"cosine to the original {cosine:.5f}, to the first text {similarity:.2f}: {text}")
    return float(np.min(cosines))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
