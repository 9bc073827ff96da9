"""The compressed-tensors layout against a reference written from its description, bit by bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from compress.common.errors import UserError
from compress.export import export
from compress.export.compressed_tensors import scheme_of, tensors_of
from compress.layers.float4_linear import Float4Linear, float4_layer
from compress.layers.float8_linear import Float8Linear
from compress.layers.grid import find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN


def row_values(words: list[int], bits: int, count: int) -> list[int]:
    """Unpack a row: value i takes the bits from i x bits on, those of word k being 32 k to 32 k + 31. Signed: the middle is zero."""
    at = [(word & 0xFFFFFFFF) >> place & 1 for word in words for place in range(32)]
    assert not any(at[count * bits :])
    values = [sum(at[index * bits + place] << place for place in range(bits)) for index in range(count)]
    return [value - 2 ** (bits - 1) for value in values]


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def linears(network: torch.nn.Module, kind: type) -> dict[str, Any]:
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


# 48 and 80 inputs, 24 to 80 outputs: rows and columns that fill no whole word among them.
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 16, True), (4, 16, False), (8, None, True), (8, 16, False), (3, 8, False), (5, None, True), (2, 16, False)],
)
def test_packed_integers_scales_and_zeros_are_the_variant_s(
    make_model, make_variant, filled, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool
) -> None:
    run = make_variant(make_model("mistral"), RTN(bits=bits, group_size=group_size, symmetric=symmetric, activations="none"))
    out = export(run, "compressed-tensors", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    layers = linears(filled(run), QuantizedLinear)
    assert len(layers) == 14
    for name, layer in layers.items():
        packed, scale, shape = (tensors.pop(f"{name}.{key}") for key in ("weight_packed", "weight_scale", "weight_shape"))
        outputs, inputs = shape.tolist()
        middle = 2 ** (bits - 1)
        assert (outputs, inputs) == (layer.out_features, layer.in_features)
        assert packed.dtype == torch.int32
        assert packed.shape == (outputs, -(-inputs * bits // 32))
        integers = torch.tensor([row_values(row, bits, inputs) for row in packed.tolist()])
        assert torch.equal(integers + middle, layer.integers().long())
        assert scale.dtype == layer.weight_scale.dtype
        assert torch.equal(scale, layer.weight_scale.view(outputs, -1))
        zeros = torch.zeros(outputs, scale.shape[1], dtype=torch.int64)
        if not symmetric:
            stored = tensors.pop(f"{name}.weight_zero_point")
            zeros = torch.tensor([row_values(column, bits, outputs) for column in stored.t().tolist()]).t()
            assert torch.equal(zeros + middle, layer.zeros().long())
        size = group_size or inputs
        spread = [index // size for index in range(inputs)]
        values = (integers - zeros[:, spread]).float() * scale.float()[:, spread]
        assert torch.equal(values, layer.dequantized())
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())  # what is not quantized
    config = quantization(out)
    assert (config["quant_method"], config["format"], config["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"].items() >= {"num_bits": bits, "symmetric": symmetric, "group_size": group_size}.items()
    assert group["weights"]["strategy"] == ("group" if group_size else "channel")
    assert config["ignore"] == []


def test_int8_products_keep_integers_and_scheme(bert: Path, make_variant, filled, tmp_path: Path) -> None:
    run = make_variant(bert, RTN())
    out = export(run, "compressed-tensors", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    for name, layer in linears(filled(run), QuantizedLinear).items():
        assert torch.equal(tensors[f"{name}.weight"], layer.weight)
        assert tensors[f"{name}.weight"].dtype == torch.int8
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale[:, None])
        assert torch.equal(tensors[f"{name}.bias"], layer.bias)
    config = quantization(out)
    assert config["format"] == "int-quantized"
    (group,) = config["config_groups"].values()
    assert group["input_activations"].items() >= {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}.items()
    # The pooler, which a variant does not have, is in readers' network.
    assert [re.match(pattern.removeprefix("re:"), "pooler.dense") is not None for pattern in config["ignore"]] == [True]


def test_channels_with_zeros() -> None:
    layer = QuantizedLinear.from_float(torch.nn.Linear(20, 12), ActivationScheme.NONE, 4, symmetric=False)
    tensors = tensors_of(layer)
    assert tensors["weight_scale"].shape == (12, 1)
    assert tensors["weight_zero_point"].shape == (2, 1)  # 12 outputs of 4 bits
    zeros = row_values(tensors["weight_zero_point"][:, 0].tolist(), 4, 12)
    assert [zero + 8 for zero in zeros] == layer.zeros()[:, 0].tolist()


def test_a_static_scale_goes_along() -> None:
    linear = torch.nn.Linear(16, 8)
    grid = find_grid(linear.weight.detach(), 8)
    layer = QuantizedLinear.from_integers(
        grid.round(linear.weight.detach()), grid, linear.bias, ActivationScheme.STATIC_PER_TENSOR, input_scale=torch.tensor(0.25)
    )
    assert tensors_of(layer)["input_scale"].tolist() == [0.25]
    scheme = scheme_of("layer", layer.layer, 16)
    assert scheme["input_activations"].items() >= {"strategy": "tensor", "dynamic": False, "symmetric": True}.items()


@pytest.mark.parametrize("activations", ["none", "dynamic_per_token"])
def test_float8_is_carried_over(bert: Path, make_variant, filled, tmp_path: Path, activations: str) -> None:
    run = make_variant(bert, FP8(activations=activations))
    out = export(run, "compressed-tensors", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    for name, layer in linears(filled(run), Float8Linear).items():
        assert tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale[:, None])
    (group,) = quantization(out)["config_groups"].values()
    assert (group["format"], group["weights"]["type"]) == ("float-quantized", "float")
    assert (group["input_activations"] is None) == (activations == "none")


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def of_e4m3(byte: int) -> float:
    """4 bits of exponent with bias 7, 3 of mantissa (arXiv 2209.05433)."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2.0**-6


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_four_bit_floats_are_the_variant_s(decoder: Path, make_variant, filled, tmp_path: Path, format: str) -> None:
    run = make_variant(decoder, RTN(format=format, activations="none"))
    out = export(run, "compressed-tensors", tmp_path / "out", check=False)
    tensors = load_file(out / "model.safetensors")
    layers = linears(filled(run), Float4Linear)
    assert len(layers) == 14
    size, nvfp4 = (16, True) if format == "nvfp4" else (32, False)
    for name, layer in layers.items():
        packed, scale = tensors.pop(f"{name}.weight_packed"), tensors.pop(f"{name}.weight_scale")
        assert packed.dtype == torch.uint8
        assert packed.shape == (layer.out_features, layer.in_features // 2)
        assert scale.dtype == (torch.float8_e4m3fn if nvfp4 else torch.uint8)
        assert scale.shape == (layer.out_features, layer.in_features // size)
        whole = float(tensors.pop(f"{name}.weight_global_scale")) if nvfp4 else 1.0
        codes = [[byte >> place & 15 for byte in row for place in (0, 4)] for row in packed.tolist()]
        values = torch.tensor([[E2M1[code & 7] * (-1) ** (code >> 3) for code in row] for row in codes])
        bytes = scale.view(torch.uint8).tolist()
        scales = torch.tensor([[of_e4m3(byte) if nvfp4 else 2.0 ** (byte - 127) for byte in row] for row in bytes]) / whole
        assert torch.equal(values * scales.repeat_interleave(size, dim=1), layer.dequantized())
    assert all(tensor.dtype == torch.float16 for tensor in tensors.values())
    config = quantization(out)
    assert config["format"] == f"{format}-pack-quantized"
    (group,) = config["config_groups"].values()
    wanted = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": size, "dynamic": False}
    assert group["weights"].items() >= wanted.items()
    assert group["weights"]["strategy"] == ("tensor_group" if nvfp4 else "group")
    assert group["input_activations"] is None


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_compressed_tensors_reads_four_bit_floats_bit_for_bit(
    decoder: Path, make_variant, filled, tmp_path: Path, format: str
) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig

    run = make_variant(decoder, RTN(format=format, activations="none"))
    out = export(run, "compressed-tensors", tmp_path / "out", check=False)
    tensors = load_file(out / "model.safetensors")
    config = QuantizationConfig.model_validate(quantization(out))
    (scheme,) = config.config_groups.values()
    reader = base.BaseCompressor.get_value_from_registry(config.format)
    assert reader.can_compress(torch.nn.Linear, scheme)
    for name, layer in linears(filled(run), Float4Linear).items():
        parts = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.weight_")}
        assert set(parts) == set(reader.compression_param_names(scheme))
        found = reader.decompress(parts, scheme)["weight"]  # in bfloat16
        assert torch.equal(found.view(torch.int16), layer.dequantized(found.dtype).view(torch.int16))


def test_each_precision_names_its_layers(decoder: Path, make_variant, tmp_path: Path) -> None:
    step = RTN(bits=4, group_size=32, activations="none", overrides={"*.down_proj": {"bits": 8}}, skip=("*.o_proj",))
    said: list[str] = []
    config = quantization(export(make_variant(decoder, step), "compressed-tensors", tmp_path / "out", said.append))
    groups = list(config["config_groups"].values())
    assert sorted(group["weights"]["num_bits"] for group in groups) == [4, 8]

    def bits_of(name: str) -> list[int]:
        matches = [
            group["weights"]["num_bits"]
            for group in groups
            for pattern in group["targets"]
            if re.match(pattern.removeprefix("re:"), name)
        ]
        ignored = any(re.match(pattern.removeprefix("re:"), name) for pattern in config["ignore"])
        return [] if ignored else matches

    for before in ("", "model."):  # as transformers names them, and as vLLM does
        assert bits_of(f"{before}layers.0.mlp.down_proj") == [8]
        assert bits_of(f"{before}layers.1.self_attn.q_proj") == [4]
        assert bits_of(f"{before}layers.1.self_attn.o_proj") == []
    assert any("Several precisions" in line for line in said)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (QuantizedLayer(bits=4, group_size=32), "48 inputs, not a multiple of the group size 32"),
        (float4_layer(Numbers.MXFP4), "48 inputs, not a multiple of the group size 32"),
        (QuantizedLayer(bits=4, activations=ActivationScheme.DYNAMIC_PER_TOKEN), "4 bits and quantized activations"),
        (
            QuantizedLayer(bits=8, activations=ActivationScheme.DYNAMIC_PER_TENSOR),
            "dynamic_per_tensor activations, which no reader runs",
        ),
    ],
)
def test_what_it_cannot_hold_is_refused(layer: QuantizedLayer, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        scheme_of("layers.0.mlp", layer, 48)
    assert refused.value.message.startswith("layers.0.mlp: ")
    assert refused.value.hint
