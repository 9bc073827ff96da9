"""Depth and width together: elsewhere an ordinary smaller model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sentence_transformers import SentenceTransformer
from tests_support import TEXTS, compress_to, encoded, folder_of
from transformers import AutoModel

from compress.common.errors import UserError
from compress.export import export
from compress.methods.base import Method
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Width
from compress.methods.quantize.rtn import RTN
from compress.models.network.segments import blocks_of
from compress.pipeline.recipe_file import parse_recipe
from compress.runtimes.lower import lower


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Depth(keep=1.0), "`keep: 1.0` of 2 blocks drops none"),
        (Width(channels=0.99, heads=0.99), "keeps all of its heads and channels"),
        (Depth(keep=0.1), "leaves none of 2 blocks"),
        (Depth(drop=(0, 1)), "leaves none of 2 blocks"),
        (Depth(drop=(5,)), "names block 5; tiny has 0, 1"),
        (Width(heads=0.1), "leaves none of 4 heads"),
    ],
)
def test_what_leaves_nothing_is_refused(bert: Path, step: Method, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        step.estimate(folder_of(bert).shape)


def test_keys_that_contradict_each_other_are_refused() -> None:
    for wrong in ({}, {"keep": 0.5, "drop": (1,)}, {"drop": (1, 1)}, {"keep": 0.5, "criterion": "angular", "what": "mlp"}):
        with pytest.raises(ValidationError):
            Depth(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="keeps everything"):
        Width()
    with pytest.raises(UserError, match=r"steps: .*steps.1 \(depth\) changes the model as a whole; put it before rtn"):
        parse_recipe({"steps": [{"method": "rtn"}, {"method": "depth", "keep": 0.5}]})


@pytest.mark.parametrize("kind", ["bert", "mistral", "qwen3", "modernbert"])
def test_elsewhere_it_is_an_ordinary_smaller_model(model_of, tmp_path: Path, kind: str) -> None:
    folder = model_of(kind)
    steps: list[Method] = [Depth(drop=(1,)), Width(channels=0.5, heads=0.5 if kind in ("mistral", "qwen3") else 1.0)]
    compress_to(folder, tmp_path / "run" / "variant", *steps)
    export(tmp_path / "run", "sentence-transformers", tmp_path / "out", check=False)
    network, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not report["missing_keys"] - {"pooler.dense.weight", "pooler.dense.bias"}
    assert not report["unexpected_keys"]
    assert len(blocks_of(network)[1]) == len(folder_of(folder).shape.layers) - 1
    elsewhere = SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32}).encode(TEXTS)
    np.testing.assert_allclose(elsewhere, encoded(tmp_path / "run" / "variant"), atol=1e-5)
    # And a workbench that is given the folder knows no more of it than that.
    np.testing.assert_allclose(encoded(tmp_path / "out"), elsewhere, atol=1e-5)


@pytest.mark.slow  # blocks of all kinds in graphs are in tests/runtimes
@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_narrow_and_shallow_model_runs_without_torch(model_of, tmp_path: Path, kind: str, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    target = tmp_path / "variant"
    compress_to(
        model_of(kind), target, Depth(what="mlp", drop=(0,)), Width(channels=0.5, heads=0.5), RTN(bits=8, activations="none")
    )
    lower(folder_of(target), runtime)
    np.testing.assert_allclose(encoded(target, runtime=runtime), encoded(target), atol=1e-4)
