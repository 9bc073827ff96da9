"""Weights in four-bit floating point as a key of `rtn` and `gptq`: who gets which, and what does not go together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tests_support import apply_in_memory, compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.layers.float4 import find_float4_grid
from compress.layers.float4_linear import Float4Linear
from compress.layers.scheme import Numbers
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.models.network.build import load_network


def test_rtn_stores_the_nearest_values_and_leaves_overrides_in_integers(bert: Path) -> None:
    network = load_network(folder_of(bert), torch.float32)
    before = {
        name: module.weight.detach().clone() for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)
    }
    step = RTN(
        format="mxfp4",
        activations="none",
        overrides={
            "*.output.dense": {"format": "int", "bits": 8},
            "*.attention.output.dense": {"format": "int", "bits": 4, "group_size": 16},
            "*.query": {"format": "nvfp4"},
        },
    )
    found = apply_in_memory(network, step)
    assert found == step.estimate(folder_of(bert).shape).quantized
    names = {name.removeprefix("encoder.layer.0."): layer.name for name, layer in found.items() if ".layer.0." in name}
    assert names == {
        "attention.self.query": "nvfp4", "attention.self.key": "mxfp4", "attention.self.value": "mxfp4",
        "attention.output.dense": "int4-g16", "intermediate.dense": "mxfp4", "output.dense": "int8",
    }  # fmt: skip
    for name, layer in found.items():
        if layer.name in ("mxfp4", "nvfp4"):
            module = network.get_submodule(name)
            assert isinstance(module, Float4Linear)
            grid = find_float4_grid(before[name], layer.numbers)
            assert torch.equal(module.values(), grid.values(grid.round(before[name])))


def test_integers_of_some_layers_may_be_floats_of_others(bert: Path) -> None:
    step = RTN(activations="none", group_size=16, overrides={"*.dense": {"format": "mxfp4"}})
    found = step.estimate(folder_of(bert).shape).quantized
    assert {layer.name for layer in found.values()} == {"int8-g16", "mxfp4"}


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_gptq_loses_less_than_rounding(make_model, mixed_texts, tmp_path: Path, format: str) -> None:
    folder = make_model("mistral")
    texts = [text for text in mixed_texts if text.strip()][:40]
    baseline = compress.load(str(folder), device="cpu").encode(texts)
    lost = {}
    for step in (RTN(format=format, activations="none"), GPTQ(format=format)):
        place = tmp_path / step.method / "variant"
        compress_to(folder, place, step)
        vectors = compress.load(str(place), device="cpu").encode(texts)
        np.testing.assert_array_equal(compress.load(str(place), device="cpu", stream=True).encode(texts), vectors)
        lost[step.method] = float(1 - (baseline * vectors).sum(axis=1).mean())
    assert 1e-4 < lost["gptq"] < lost["rtn"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"group_size": 64}, "`group_size: 64` does not go with `format: mxfp4`, whose weights have 4 bits in groups of 32"),
        ({"bits": 3}, "`bits: 3` does not go with"),
        ({"symmetric": False}, "`symmetric: false` does not go with"),
        ({"activations": "dynamic_per_group"}, "`format: mxfp4` goes with `activations: none`"),
    ],
)
@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_keys_that_the_format_decides_are_refused(method: type[RTN] | type[GPTQ], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        method(format="mxfp4", **{"activations": "none"} | settings)


def test_more_is_refused_by_name(bert: Path) -> None:
    with pytest.raises(ValidationError, match="goes with `activations: none`, not with dynamic_per_token"):
        RTN(format="nvfp4")
    with pytest.raises(ValidationError, match="`search: true` does not go with"):
        RTN(format="nvfp4", activations="none", search=True)
    shape = folder_of(bert).shape
    for overrides, words in (
        ({"*.query": {"bits": 8}}, r"query: `bits: 8` does not go with `format: nvfp4`"),
        ({"*.query": {"group_size": None}}, r"query: `group_size: null` does not go with"),
        ({"*.query": {"activations": "dynamic_per_token"}}, r"query: `format: nvfp4` goes with `activations: none`"),
    ):
        with pytest.raises(ValueError, match=words):
            RTN(format="nvfp4", activations="none", overrides=overrides).estimate(shape)
    with pytest.raises(ValueError, match=r"query: `format: mxfp4` goes with `activations: none`"):
        RTN(overrides={"*.query": {"format": "mxfp4"}}).estimate(shape)


@pytest.mark.parametrize("step", [RTN(format="nvfp4", activations="none"), GPTQ(format="mxfp4")], ids=["rtn", "gptq"])
def test_a_step_that_was_written_whole_is_read_back(step: RTN | GPTQ) -> None:
    written = step.model_dump(mode="json")
    assert not {"bits", "group_size", "symmetric", "search"} & written.keys()
    assert type(step).model_validate_json(json.dumps(written)) == step
    plain = GPTQ(bits=3)
    assert GPTQ.model_validate_json(json.dumps(plain.model_dump(mode="json"))) == plain


def test_runtimes_of_graphs_and_gguf_refuse_it(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    compress_to(bert, tmp_path / "run" / "variant", RTN(format="mxfp4", activations="none"))
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(UserError, match=f"{runtime} does not execute mxfp4 weights") as refused:
            compress.load(str(tmp_path / "run"), device="cpu", runtime=runtime)
        assert "torch" in refused.value.hint
    auto = compress.load(str(tmp_path / "run"), device="cpu", runtime="auto")
    assert np.isfinite(auto.encode(["a text"])).all()
    assert Numbers("mxfp4") is Numbers.MXFP4
