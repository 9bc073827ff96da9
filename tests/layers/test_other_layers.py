"""Tables of integers, FP8 and bitsandbytes' layers; integer layers of any width against their own dequantized weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.layers.bitsandbytes_linear import BitsAndBytes4BitLinear, BitsAndBytesInt8Linear
from compress.layers.compressed import CompressedLayer
from compress.layers.empty import empty_layer
from compress.layers.float8_linear import E4M3, Float8Linear, to_float8
from compress.layers.grid import find_grid
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer

NONE, PER_TOKEN = ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_TOKEN


def refilled(original: nn.Module, layer: CompressedLayer) -> CompressedLayer:
    """What a variant's file gives back: an empty layer, filled with what was stored."""
    empty = empty_layer(original, layer.layer)
    assert {name: (t.shape, t.dtype) for name, t in empty.state_dict().items() if name != "bias"} == {
        name: (t.shape, t.dtype) for name, t in layer.state_dict().items() if name != "bias"
    }
    for name, tensor in layer.state_dict().items():
        setattr(empty, name, tensor)
    return empty


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [64, 37])
def test_weight_only_layers_multiply_their_dequantized_weight(bits: int, group_size, symmetric: bool, inputs: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 24), torch.randn(2, 5, inputs)
    layer = QuantizedLinear.from_float(linear, NONE, bits, group_size=group_size, symmetric=symmetric)
    grid = find_grid(linear.weight.detach(), bits, group_size, symmetric)
    assert torch.equal(layer.integers(), grid.round(linear.weight.detach()))
    assert torch.equal(layer.dequantized(), grid.values(layer.integers()))
    expected = x @ layer.dequantized().t() + linear.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.held(torch.float32)(x), layer(x), rtol=0, atol=0)
    assert torch.equal(refilled(linear, layer)(x), layer(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scheme", [NONE, PER_TOKEN, ActivationScheme.STATIC_PER_TENSOR])
def test_an_input_factor_divides_what_comes(bits: int, scheme: ActivationScheme) -> None:
    torch.manual_seed(0)
    linear, x, factor = nn.Linear(32, 24), torch.randn(50, 32), torch.rand(32) * 4 + 0.25
    weight = linear.weight.detach() * factor
    grid = find_grid(weight, bits)
    static = torch.tensor(float((x / factor).abs().max()) / 127) if scheme is ActivationScheme.STATIC_PER_TENSOR else None
    settings = {"input_scale": static, "input_factor": factor}
    layer = QuantizedLinear.from_integers(grid.round(weight), grid, linear.bias, scheme, **settings)
    exact = (x / factor) @ layer.dequantized().t() + linear.bias
    bound = 0.1 * float(exact.detach().abs().max())
    torch.testing.assert_close(layer(x), exact, rtol=0, atol=1e-5 if scheme is NONE else bound)
    again = refilled(linear, layer)
    assert torch.equal(again(x), layer(x))
    torch.testing.assert_close(layer.held(torch.float32)(x), again(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 16])
def test_tables_look_up_what_they_stand_for(bits: int, group_size: int | None) -> None:
    torch.manual_seed(0)
    table, ids = nn.Embedding(50, 48), torch.tensor([[0, 49, 7], [7, 7, 1]])
    grid = find_grid(table.weight.detach(), bits, group_size)
    layer = QuantizedEmbedding.from_integers(grid.round(table.weight.detach()), grid)
    assert torch.equal(layer(ids), grid.values(grid.round(table.weight.detach()))[ids])
    assert torch.equal(refilled(table, layer)(ids), layer(ids))
    layer.dtype = torch.bfloat16
    assert layer(ids).dtype == torch.bfloat16


def test_fp8_rounds_both_sides_to_e4m3() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(7, 64) * torch.tensor([1e-3, 1, 1e3, 1, 1, 1, 0.0])[:, None]
    layer = Float8Linear.from_float(linear, PER_TOKEN)
    assert layer.weight.dtype == E4M3
    quantized, scale = to_float8(x)
    assert float(quantized.float().abs().max()) == 448
    expected = (quantized.double() * scale) @ (layer.weight.double() * layer.weight_scale[:, None]).t() + linear.bias
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-3)
    assert (layer(x) - linear(x)).abs().max() > 1e-3 * linear(x).abs().max()
    assert torch.equal(refilled(linear, layer)(x), layer(x))
    weights_alone = Float8Linear.from_float(linear, NONE)
    torch.testing.assert_close(
        weights_alone(x), x @ (layer.weight.float() * layer.weight_scale[:, None]).t() + linear.bias, rtol=1e-4, atol=1e-3
    )
    with pytest.raises(ValueError, match="scaled per token"):
        Float8Linear.from_float(linear, ActivationScheme.DYNAMIC_PER_TENSOR)


def test_fp8_known_values() -> None:
    quantized, scale = to_float8(torch.tensor([[448.0, 1.0, 1.0625, 17.0, -500.0 * 0]]))
    assert float(scale) == 1
    assert quantized.float().tolist() == [[448.0, 1.0, 1.0, 16.0, 0.0]]  # three bits of mantissa, ties to even


bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `bitsandbytes` is not installed")


@pytest.mark.parametrize("numbers", [Numbers.NF4, Numbers.FP4])
@pytest.mark.parametrize("inputs", [64, 48])
def test_bitsandbytes_four_bits_are_the_package_s_own(numbers: Numbers, inputs: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 40), torch.randn(3, 9, inputs)
    layer = BitsAndBytes4BitLinear.from_float(linear, numbers)
    own = bitsandbytes.nn.Linear4bit(inputs, 40, compute_dtype=torch.float32, quant_type=str(numbers), compress_statistics=True)
    own.load_state_dict(linear.state_dict())
    own = own.to("cpu")
    functional = bitsandbytes.functional
    stored, state = functional.quantize_4bit(linear.weight.detach(), quant_type=str(numbers), compress_statistics=True)
    assert torch.equal(layer.dequantized(), functional.dequantize_4bit(stored, state))
    torch.testing.assert_close(layer(x), x @ layer.dequantized().t() + linear.bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(refilled(linear, layer)(x), layer(x))


def test_llm_int8_keeps_outliers_that_plain_int8_loses() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 32), torch.randn(20, 64)
    x[:, 5] *= 200
    layer = BitsAndBytesInt8Linear.from_float(linear, QuantizedLayer(numbers=Numbers.LLM_INT8, bits=8, activations=PER_TOKEN))
    plain = QuantizedLinear.from_float(linear, PER_TOKEN)
    exact = linear(x)
    assert (layer(x) - exact).abs().mean() < 0.3 * (plain(x) - exact).abs().mean()
    assert torch.equal(refilled(linear, layer)(x), layer(x))
