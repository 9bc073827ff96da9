"""Shrink an embedder of your own: plan, run, compare the vectors, export.

    python examples/shrink_your_own.py                                  # the built-in model, offline
    python examples/shrink_your_own.py FOLDER_OR_HUB_NAME shrunk --texts texts.jsonl

Runs and the export are kept in the folder `shrunk`; the same command continues what was stopped. `compress run` does the same, and
times the variant too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import compress
from compress.data.texts import read_texts, suite_texts
from compress.export import export
from compress.measure.record import Record
from compress.models.source import find_shape
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe_file import read_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "int4-onnx.yaml"  # weights in four bits, for ONNX Runtime on any CPU


@dataclass(frozen=True)
class Shrunk:
    """What became of a model."""

    record: Record
    cosines: np.ndarray
    """Between old and new vector of each text, float32 [texts]."""
    exported: Path


def shrink(model: str, folder: Path, texts: Sequence[str], tasks: Sequence[str] = ("mini",)) -> Shrunk:
    """Make and score a variant in `folder`, compare its vectors of the texts with the model's, and export it."""
    # 1. What would it do? Sizes, memory and time, from the shape alone: no weights are loaded.
    recipe = read_recipe(RECIPE)
    print(describe(make_plan(recipe, find_shape(model, to_compress=True), folder)))

    # 2. Compress, and score both models on the tasks: `mini` ships with the package, `./my-task` is one of your own.
    untimed = recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"what": ("fidelity",)})})
    record = compress.run(untimed, model=model, tasks=tasks, output=folder)
    for row in record.tasks:
        print(f"{row.task}: {row.metric} {100 * row.baseline:.2f} -> {100 * row.variant:.2f} ({row.verdict})")

    # 3. Your texts through both. A run's folder is a model like any other.
    before = compress.load(model).encode(texts)
    after = compress.load(str(folder / record.run)).encode(texts)
    cosines = (before * after).sum(axis=1) / (np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1))
    print(f"old and new vectors of {len(texts)} texts: mean cosine {cosines.mean():.4f}, lowest {cosines.min():.4f}")

    # 4. The same integers for ONNX Runtime without this package, read back in a process of its own before they are kept.
    exported = folder / f"{record.run}-onnx"
    if not exported.exists():
        export(folder / record.run, "onnx", exported, say=print)
    print(f"{exported}: its README.md says how to use it")
    return Shrunk(record, cosines, exported)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="nano", help="built-in name, folder or hub name")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("shrunk"), help="for runs and the export")
    parser.add_argument("--texts", type=Path, help="texts of your own; defaults to texts that ship with the package")
    parser.add_argument("--tasks", default="mini", help="tasks to score, with commas")
    asked = parser.parse_args()
    own = read_texts(asked.texts) if asked.texts else suite_texts()[:256]
    shrink(asked.model, asked.folder, own, asked.tasks.split(","))
