"""Every recipe of the project, from end to end: on a tiny BERT and on a tiny NV-Embed, latent head included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.common.machine import multiplies_bytes_exactly
from compress.data.texts import calibration_texts
from compress.layers.scheme import ActivationScheme
from compress.methods.base import Method
from compress.methods.distill.method import Distill
from compress.methods.distill.static_student import StaticStudent
from compress.methods.distill.student import Student
from compress.methods.prune.depth import Depth
from compress.models.files.variant import VariantInfo
from compress.pipeline.recipe import Calibration, Evaluate, Gates, Measure
from compress.pipeline.recipe_file import read_recipe
from compress.pipeline.rounds import Rounds
from compress.pipeline.run import run
from compress.runtimes.contract import GRAPH_RUNTIMES

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TEXTS = ["the parcel never came", "rain by the evening", "who wrote it", "x", ""]


IN_BRIEF = {("lossless", "nv_embed"), ("int4-gptq", "nv_embed")}
"""What `make test` runs on NV-Embed too: what BERT has nothing of, and a calibrated recipe."""
LENGTHY = {("int4-a8-onnx", "bert"), ("bf16-openvino", "bert"), ("heal-depth-50", "bert"), ("depth-50", "bert"), ("distill-nano", "bert"),
           ("heal-int3", "bert"), ("heal-width-25", "bert")}  # fmt: skip
"""What differs from another recipe in a number or in what is healed, or has a test of its own in tests/runtimes, and takes seconds."""


def _cases() -> Iterator[object]:
    """Every recipe on both; most of those on NV-Embed by `make test-slow`."""
    for path in RECIPES:
        for kind in ("bert", "nv_embed"):
            case = (path.stem, kind)
            slow = case in LENGTHY or (kind == "nv_embed" and case not in IN_BRIEF)
            yield pytest.param(path, kind, id=f"{path.stem}-{kind}", marks=[pytest.mark.slow] if slow else [])


def shortened(step: Distill, folder: Path) -> Distill:
    """A distillation of a few steps, on the embedded calibration texts; a new student of the same kind, and tiny."""
    texts = folder / "texts.txt"
    texts.write_text("\n".join(text.replace("\n", " ") for text in calibration_texts()))
    student = step.student
    if isinstance(student, Student):
        sizes = {"width": 32, "blocks": 2, "heads": 4, "kv_heads": 2, "mlp": 48, "latents": 4, "vocabulary": 600, "max_length": 64}
        student = student.model_copy(update=sizes)
    if isinstance(student, StaticStudent):
        student = student.model_copy(update={"width": 32, "words": 0})  # NV-Embed's tokens are not WordPiece
    short = {"count": 400, "held_out": 100, "steps": 10, "batch": 16, "every": 5, "max_tokens": 32, "precision": "no"}
    widths = (16,) if step.matryoshka else ()
    return step.model_copy(update={"texts": str(texts), "student": student, "matryoshka": widths, **short})


def smaller(step: Method | Rounds, folder: Path) -> Method | Rounds:
    """A step for a network of two blocks, of which a quarter is none."""
    if isinstance(step, Rounds):
        return step.model_copy(update={"steps": tuple(smaller(own, folder) for own in step.steps)})
    if isinstance(step, Depth):
        return step.model_copy(update={"keep": 0.5})
    return shortened(step, folder) if isinstance(step, Distill) else step


@pytest.mark.parametrize(("path", "kind"), _cases())
def test_a_recipe_runs_to_its_end(request: pytest.FixtureRequest, path: Path, kind: str, tmp_path: Path) -> None:
    recipe = read_recipe(path)
    folder = request.getfixturevalue(kind)
    methods = {step.method for step in recipe.methods}
    if "bitsandbytes" in methods:
        pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")
    pytest.importorskip(recipe.runtime, reason=f"{recipe.runtime} is not installed")
    # The recipe's own steps; smaller, what is measured, the texts that are looked at and what is learned from them.
    small = recipe.model_copy(
        update={
            "steps": tuple(smaller(step, tmp_path) for step in recipe.steps),
            "evaluate": Evaluate(tasks=("MiniSTS",) if path.stem == "int8" else (), baseline="float32"),
            "measure": Measure(what=("fidelity",), count=16),
            "calibration": Calibration(count=32),
            "gates": Gates(),
        }
    )
    if kind == "bert" and "fold" in methods:
        with pytest.raises(UserError, match="no latent-attention head to fold"):
            run(small, model=str(folder), output=tmp_path, device="cpu")
        return
    exact_anywhere = (ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_GROUP)
    byte_products = any(getattr(step, "activations", ActivationScheme.NONE) not in exact_anywhere for step in small.methods)
    if recipe.runtime in GRAPH_RUNTIMES and byte_products and not multiplies_bytes_exactly():
        with pytest.raises(UserError, match="would let byte products overflow on this CPU"):
            run(small, model=str(folder), output=tmp_path, device="cpu")
        return
    record = run(small, model=str(folder), output=tmp_path, device="cpu")
    info = VariantInfo.read(tmp_path / record.run / "variant")
    new = any(isinstance(step, Distill) and step.student is not None for step in recipe.methods)
    assert info.folded == (kind == "nv_embed" and not new)
    assert bool(info.quantized) == bool(methods - {"fold", "magnitude", "wanda", "sparsegpt", "depth", "width", "distill"})
    assert record.rows[-1].runtime == info.runtime == recipe.runtime
    assert record.rows[-1].compute == (recipe.dtype or "float32")
    assert not any(name.startswith("latent_attention_model") for name in info.quantized)
    assert record.fidelity is not None
    embedder = compress.load(str(tmp_path / record.run), device="cpu")
    vectors, baseline = embedder.encode(TEXTS), compress.load(str(folder), device="cpu").encode(TEXTS)
    assert np.isfinite(vectors).all()
    if new:  # whose size and vectors are its own
        assert (record.fidelity.similarity_spearman or 0) > 0
    else:
        half = 2 * record.model.parameters
        # Three quarters of two blocks are two; and headers are a part of a tiny file.
        changed = bool(methods - {"depth", "distill"}) or (
            info.layers is not None and len(info.layers) < folder_of(folder).shape.blocks
        )
        assert record.rows[-1].size_bytes < (half if changed else 1.1 * half)
        assert (record.fidelity.cosine_mean or 0) > 0.6  # a random network forgives little; three bits and NF4 on 48 inputs least
        assert (vectors * baseline).sum(axis=1).min() > 0.3
    if recipe.runtime == "torch":
        streamed = compress.load(str(tmp_path / record.run), device="cpu", stream=True).encode(TEXTS)
        np.testing.assert_array_equal(streamed, vectors)
