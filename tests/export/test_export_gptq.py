"""The GPTQ layout against a reference written from its description, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compress.common.errors import UserError
from compress.export import export
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import QuantizedLayer
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN


def column_values(words: list[int], bits: int) -> list[int]:
    """Unpack the words of one column: 2, 4 and 8 bits lie side by side; 32 values of 3 bits lie in three words."""
    words = [word & 0xFFFFFFFF for word in words]
    if bits != 3:
        return [(word >> shift) & (2**bits - 1) for word in words for shift in range(0, 32, bits)]
    values = []
    for first, second, third in zip(words[::3], words[1::3], words[2::3], strict=True):
        values += [(first >> 3 * place) & 7 for place in range(10)]
        values.append((first >> 30) | ((second & 1) << 2))
        values += [(second >> (3 * place + 1)) & 7 for place in range(10)]
        values.append((second >> 31) | ((third & 3) << 1))
        values += [(third >> (3 * place + 2)) & 7 for place in range(10)]
    return values


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(4, 32, True), (4, 16, False), (8, None, True), (8, 32, False), (3, 32, False), (2, None, True)],
)
def test_integers_scales_and_zeros_are_the_variant_s(
    decoder: Path, make_variant, filled, tmp_path: Path, bits: int, group_size: int | None, symmetric: bool
) -> None:
    run = make_variant(decoder, RTN(bits=bits, group_size=group_size, symmetric=symmetric, activations="none"))
    out = export(run, "gptq", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    layers = {name: module for name, module in filled(run).named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        stored = {key: tensors.pop(f"model.{name}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")}
        outputs, inputs, size = layer.out_features, layer.in_features, group_size or layer.in_features
        assert stored["qweight"].shape == (inputs * bits // 32, outputs)
        assert stored["qzeros"].shape == (inputs // size, outputs * bits // 32)
        assert stored["qweight"].dtype == stored["qzeros"].dtype == stored["g_idx"].dtype == torch.int32
        integers = [column_values(column, bits) for column in stored["qweight"].t().tolist()]
        zeros = [column_values(row, bits) for row in stored["qzeros"].tolist()]
        assert integers == layer.integers().tolist()
        assert [[zero + 1 for zero in row] for row in zeros] == layer.zeros().t().tolist()
        assert stored["scales"].dtype == layer.weight_scale.dtype
        assert torch.equal(stored["scales"], layer.weight_scale.view(outputs, -1).t())
        assert stored["g_idx"].tolist() == [index // size for index in range(inputs)]
        # As readers put it together.
        group = stored["g_idx"].long()
        unpacked, zero = torch.tensor(integers).t(), torch.tensor(zeros) + 1
        values = (unpacked - zero[group]).float() * stored["scales"].float()[group]
        assert torch.equal(values.t(), layer.dequantized())
    assert all(name.startswith("model.") and tensor.dtype == torch.float16 for name, tensor in tensors.items())
    config = json.loads((out / "config.json").read_text())
    described = json.loads((out / "quantize_config.json").read_text())
    assert config["quantization_config"] == described
    wanted = {"bits": bits, "group_size": group_size or -1, "sym": symmetric, "desc_act": False, "checkpoint_format": "gptq"}
    assert described.items() >= wanted.items()
    assert config["tie_word_embeddings"] is False
    assert config["rope_theta"] == 5e4


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (RTN(), "no activation scheme"),
        (FP8(), "fp8 numbers"),
        (RTN(bits=5, activations="none"), "5 bits"),
        (RTN(bits=4, group_size=24, activations="none"), "not a multiple of the group size 24"),
        (RTN(bits=4, activations="none", overrides={"*.down_proj": {"bits": 8}}), "a single precision"),
        (RTN(bits=4, activations="none", skip=("layers.1.mlp.*",)), "cannot distinguish it"),
    ],
)
def test_what_it_cannot_hold_is_refused(decoder: Path, make_variant, tmp_path: Path, step, words: str) -> None:
    run = make_variant(decoder, step)
    with pytest.raises(UserError, match=words) as refused:
        export(run, "gptq", tmp_path / "out")
    assert refused.value.message.startswith("layers.")
    assert refused.value.hint


def test_widths_are_whole_runs_of_32(bert: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(bert, RTN(bits=4, group_size=16, activations="none"))
    with pytest.raises(UserError, match="48 inputs, not a multiple of 32"):
        export(run, "gptq", tmp_path / "out")


def test_layers_left_out_in_every_block_are_left_out_of_the_config(decoder: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(decoder, RTN(bits=4, activations="none", skip=("*.down_proj",)))
    out = export(run, "gptq", tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == torch.float16
    (chosen,) = json.loads((out / "quantize_config.json").read_text())["modules_in_block_to_quantize"]
    assert sorted(chosen) == sorted([f"self_attn.{part}_proj" for part in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj"])


def test_zeros_are_never_below_one() -> None:
    """Or one less would wrap around."""
    linear = torch.nn.Linear(32, 32)
    with torch.no_grad():
        linear.weight.abs_()  # no group has a negative weight
    layer = QuantizedLinear.from_float(linear, "none", 4, group_size=16, symmetric=False)
    assert layer.layer == QuantizedLayer(bits=4, group_size=16, symmetric=False)
    assert int(layer.zeros().min()) == 1
