"""`distill` as a step of a recipe, with steps before and after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests_support import TEXTS, compress_to

import compress
from compress.data.texts import suite_texts
from compress.methods.distill.method import Distill
from compress.methods.prune.depth import Depth
from compress.methods.prune.magnitude import Magnitude
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo


@pytest.mark.slow  # recipes that heal and quantize are in tests/pipeline, what a training learns is in test_training
def test_a_pruned_model_is_healed_and_quantized_in_one_recipe(minilm: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(
        texts=str(texts),
        held_out=40,
        steps=16,
        batch=16,
        every=8,
        learning_rate=3e-4,
        max_tokens=32,
        hidden=0.1,
        hard_negatives=1,
        precision="no",  # bfloat16 is very slow on processors that do not multiply it
    )
    compress_to(minilm, tmp_path / "pruned", Depth(drop=(1, 2, 3)))
    compress_to(minilm, tmp_path / "healed", Depth(drop=(1, 2, 3)), heal, RTN())
    judged = list(suite_texts()[400:450])
    whole = compress.load("minilm", device="cpu").encode(judged)
    cosines = {
        name: float((compress.load(str(tmp_path / name), device="cpu").encode(judged) * whole).sum(axis=1).mean())
        for name in ("pruned", "healed")
    }
    assert cosines["healed"] > cosines["pruned"] + 0.05
    info = VariantInfo.read(tmp_path / "healed")
    assert info.layers == (0, 4, 5)
    assert info.quantized


def test_a_run_of_two_walks_goes_on_where_a_variant_was_written_and_not_noted(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=2, batch=16, every=2, precision="no")
    compress_to(bert, tmp_path / "v", Magnitude(sparsity=0.5), heal)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "v-journal").rglob("*.safetensors")}
    vectors = compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS)
    # Killed behind the renaming of the first walk's variant, and of the second's, before either was noted.
    (tmp_path / "v-journal" / "stage-0" / "done.json").unlink()
    compress_to(bert, tmp_path / "v", Magnitude(sparsity=0.5), heal)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "v-journal").rglob("*.safetensors")} == before
    np.testing.assert_array_equal(compress.load(str(tmp_path / "v"), device="cpu").encode(TEXTS), vectors)
