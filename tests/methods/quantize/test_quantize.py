"""The methods on whole networks: what is quantized, by what precision, and that calibration pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import apply_in_memory, compress_to, encoded, folder_of

import compress
from compress.common.errors import UserError
from compress.methods.base import Method
from compress.methods.nv_embed.fold import Fold
from compress.methods.quantize.awq import AWQ
from compress.methods.quantize.bitsandbytes import BitsAndBytes
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.methods.quantize.smoothquant import SmoothQuant
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.pipeline.recipe_file import parse_recipe

GROUPS = {"bits": 4, "group_size": 16}


METHODS: list[Method] = [
    RTN(activations="none", symmetric=False, **GROUPS),
    RTN(activations="none", format="mxfp4"),
    RTN(activations="none", format="nvfp4"),
    GPTQ(**GROUPS),
    GPTQ(format="nvfp4"),
    GPTQ(weighting="pooled", **GROUPS),
    GPTQ(drift=0.5, weighting="pooled", **GROUPS),
    AWQ(**GROUPS),
    AWQ(keep_factors=False, **GROUPS),
    SmoothQuant(),
    SmoothQuant(alpha=0.5, activations="static_per_tensor"),
    SmoothQuant(activations="static_per_tensor", range="percentile", keep_factors=False),
    FP8(),
    FP8(activations="none"),
    BitsAndBytes(format="nf4"),
    BitsAndBytes(format="llm-int8"),
    Embeddings(bits=4, group_size=16),
]


def name_of(step: Method) -> str:
    return "-".join(str(value) for value in step.model_dump(exclude_defaults=True).values()) or step.method


@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("step", METHODS, ids=name_of)
def test_a_variant_is_near_its_model_and_as_large_as_planned(
    make_model, mixed_texts, tmp_path: Path, kind: str, step: Method
) -> None:
    if step.method == "bitsandbytes":
        pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")
    folder = make_model(kind)
    compress_to(folder, tmp_path / "variant", step)
    info = VariantInfo.read(tmp_path / "variant")
    shape = folder_of(folder).shape
    wanted = {shape.token_table} if step.method == "embeddings" else set(shape.block_linears)
    assert set(info.quantized) == wanted
    texts = mixed_texts[:40]
    baseline, variant = (compress.load(str(path), device="cpu").encode(texts) for path in (folder, tmp_path / "variant"))
    cosine = (baseline * variant).sum(axis=1)
    # NF4's blocks of 64 reach over rows of 48 and 80 weights, whose sizes differ: coarser here than on real widths. MXFP4 and NVFP4
    # have no zero points.
    assert (0.9 if getattr(step, "format", "int") == "int" else 0.8) < cosine.mean() < cosine.max() < 1 - 1e-7
    # Factors that a norm or a layer has taken over are planned for and not stored.
    after, stored = step.estimate(shape).after, folder_of(tmp_path / "variant").shape
    kept = {name: info for name, info in after.tensors.items() if not name.endswith("input_factor") or name in stored.tensors}
    ours = {name: info for name, info in stored.tensors.items() if not name.endswith("position_ids")}
    assert {name: (info.dtype, info.shape) for name, info in ours.items()} == {
        name: (info.dtype, info.shape) for name, info in kept.items() if not name.endswith("position_ids")
    }


@pytest.mark.parametrize("kind", ["bert", pytest.param("mistral", marks=pytest.mark.slow)])
def test_calibration_keeps_more_of_the_vectors(make_model, mixed_texts, tmp_path: Path, kind: str) -> None:
    """At the same bits GPTQ and AWQ lose less than plain rounding, on texts that they were not calibrated on."""
    folder = make_model(kind)
    texts = [text for text in mixed_texts if text.strip()][:60]
    baseline = compress.load(str(folder), device="cpu").encode(texts)
    lost = {}
    for step in (
        RTN(bits=3, group_size=16, activations="none"),
        GPTQ(bits=3, group_size=16),
        AWQ(bits=3, group_size=16, symmetric=True),
    ):
        compress_to(folder, tmp_path / step.method / "variant", step)
        made = compress.load(str(tmp_path / step.method / "variant"), device="cpu").encode(texts)
        lost[step.method] = float(1 - (baseline * made).sum(axis=1).mean())
    assert lost["gptq"] < 0.8 * lost["rtn"]
    assert lost["awq"] < lost["rtn"]


def test_overrides_and_skip_go_by_pattern(bert: Path) -> None:
    step = RTN(
        bits=4, activations="none", skip=("*.layer.1.*",),
        overrides={"*.dense": {"bits": 8}, "*.attention.output.dense": {"group_size": 16}, "*.value": {"symmetric": False}},
    )  # fmt: skip
    found = {
        name.removeprefix("encoder.layer.0."): layer
        for name, layer in apply_in_memory(load_network(folder_of(bert), torch.float32), step).items()
    }
    assert {name: (layer.bits, layer.group_size, layer.symmetric) for name, layer in found.items()} == {
        "attention.self.query": (4, None, True),
        "attention.self.key": (4, None, True),
        "attention.self.value": (4, None, False),
        "attention.output.dense": (8, 16, True),
        "intermediate.dense": (8, None, True),
        "output.dense": (8, None, True),
    }
    with pytest.raises(ValueError, match=r"'\*\.nosuch' matches none"):
        GPTQ(overrides={"*.nosuch": {"bits": 8}}).estimate(folder_of(bert).shape)
    with pytest.raises(UserError, match="overrides"):
        parse_recipe({"steps": [{"method": "gptq", "overrides": {"*.dense": {"bit": 8}}}]})
    with pytest.raises(UserError, match="groups and zeros go with `activations: none`"):
        parse_recipe({"steps": [{"method": "rtn", "overrides": {"*.dense": {"group_size": 16}}}]})


def test_activations_go_by_layer(bert: Path, tmp_path: Path) -> None:
    mixed = RTN(overrides={"*.layer.1.*": {"activations": "none"}, "*.layer.1.output.dense": {"bits": 4, "group_size": 16}})
    compress_to(bert, tmp_path / "variant", mixed)
    found = VariantInfo.read(tmp_path / "variant").quantized
    assert found == mixed.estimate(folder_of(bert).shape).quantized
    assert {layer.activations for name, layer in found.items() if ".0." in name} == {"dynamic_per_token"}
    assert {layer.activations for name, layer in found.items() if ".1." in name} == {"none"}
    # What the override says of every layer is what the step would say of them.
    for target, step in {"a": RTN(overrides={"*": {"activations": "none"}}), "b": RTN(activations="none")}.items():
        compress_to(bert, tmp_path / target, step)
    np.testing.assert_array_equal(encoded(tmp_path / "a"), encoded(tmp_path / "b"))
    assert not np.array_equal(encoded(tmp_path / "a"), encoded(tmp_path / "variant"))
    with pytest.raises(ValueError, match=r"layer\.0\.[a-z.]+: groups and zeros go with `activations: none`"):
        RTN(group_size=16, overrides={"*.layer.1.*": {"activations": "none"}}).estimate(folder_of(bert).shape)


def test_overrides_are_read_as_they_were_written() -> None:
    step = GPTQ(group_size=16, overrides={"*.a": {"bits": 8}, "*.b": {"group_size": None}, "*.c": {"symmetric": None}})
    again = GPTQ.model_validate_json(step.model_dump_json())
    assert [again.numbers_of(name).name for name in ("x.a", "x.b", "x.c")] == ["int8-g16", "int4", "int4-g16"]
    assert again == step


def test_a_second_step_takes_what_the_first_has_left(bert: Path, tmp_path: Path) -> None:
    first, second = GPTQ(skip=("*.output.dense",), **GROUPS), RTN()
    compress_to(bert, tmp_path / "variant", first, second)
    found = {name: layer.name for name, layer in VariantInfo.read(tmp_path / "variant").quantized.items()}
    assert {name for name, kind in found.items() if kind == "int8"} == {name for name in found if name.endswith("output.dense")}
    shape = folder_of(bert).shape
    after = second.estimate(first.estimate(shape).after)
    assert "4 linear layers" in after.note
    with pytest.raises(ValueError, match="no linear layer left for rtn"):
        RTN().estimate(after.after)


def test_inputs_that_are_not_finite_are_refused_by_name(bert: Path, copy_of, tmp_path: Path) -> None:
    folder = copy_of(bert)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.0.output.LayerNorm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"encoder\.layer\.0\.output\.LayerNorm\.weight is not finite|the input of encoder\.layer\.1"
    ):
        compress_to(folder, tmp_path / "variant", GPTQ(**GROUPS))


@pytest.mark.parametrize(
    "step",
    [
        GPTQ(head=True, group_size=16),
        *(pytest.param(step, marks=pytest.mark.slow) for step in (RTN(head=True), SmoothQuant(head=True))),
    ],
    ids=lambda step: step.method,
)
def test_the_folded_head_is_quantized_where_that_is_asked(nv_embed: Path, tmp_path: Path, step: Method) -> None:
    compress_to(nv_embed, tmp_path / "variant", Fold(), step)
    head = {name for name in VariantInfo.read(tmp_path / "variant").quantized if name.startswith("latent")}
    assert head == {f"latent_attention_model.{part}" for part in ("scores", "values", "net.0", "net.2")}
    texts = ["the parcel never came", "rain by the evening", "who wrote it"]
    baseline, variant = (compress.load(str(path), device="cpu").encode(texts) for path in (nv_embed, tmp_path / "variant"))
    assert 0.9 < (baseline * variant).sum(axis=1).min() < 1 - 1e-6
    np.testing.assert_allclose(
        compress.load(str(tmp_path / "variant"), device="cpu", stream=True).encode(texts), variant, rtol=0, atol=0
    )
    with pytest.raises(ValueError, match="no folded latent-attention head"):
        step.estimate(folder_of(nv_embed).shape)
