"""Integer products: exact, the same packed and unpacked, under every activation scheme."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.layers.float_layers import CastEmbedding, OneDnnLinear
from compress.layers.grid import find_grid
from compress.layers.int8_matmul import IntMmMatmul, OneDnnMatmul, OneDnnSplitMatmul, int8_matmul, is_exact
from compress.layers.quantized_linear import QMAX, QuantizedLinear, quantize_symmetric, round_groups
from compress.layers.scheme import ActivationScheme, QuantizedLayer

# A CPU without VNNI saturates in `OneDnnMatmul`; that it is not chosen there is what `is_exact` is for.
KERNELS = [
    pytest.param(
        kernel,
        marks=pytest.mark.skipif(not is_exact(kernel, torch.device("cpu")), reason="saturates on this CPU, which has no VNNI"),
    )
    for kernel in (OneDnnMatmul, OneDnnSplitMatmul, IntMmMatmul)
]
SCHEMES = [ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_TENSOR, ActivationScheme.DYNAMIC_PER_TOKEN]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (3, 7, 5), (17, 384, 384), (130, 129, 33), (65, 1536, 9)])
def test_products_are_exact(kernel, rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(outputs, generator=generator) + 0.1
    expected = (x.long() @ weight.long().t()).double() * scale.double()
    product = kernel(weight, scale)(x, torch.float32)
    assert product.shape == (rows, outputs)
    torch.testing.assert_close(product.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_extremes_do_not_saturate(kernel) -> None:
    x = torch.full((20, 4096), 127, dtype=torch.int8)
    weight = torch.full((8, 4096), 127, dtype=torch.int8)
    assert (kernel(weight, torch.ones(8))(x, torch.float32) == 4096 * 127 * 127).all()


def test_the_chosen_kernel_is_exact() -> None:
    x = torch.full((20, 4096), -128, dtype=torch.int8)
    weight = torch.full((8, 4096), 127, dtype=torch.int8)
    assert (int8_matmul("cpu")(weight, torch.ones(8))(x, torch.float32) == 4096 * -128 * 127).all()


def test_a_kernel_that_saturates_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OneDnnMatmul.__call__
    monkeypatch.setattr(OneDnnMatmul, "__call__", lambda self, x, dtype: right(self, x, dtype).clamp(max=2**15 - 1))
    int8_matmul.cache_clear()
    assert int8_matmul("cpu") is OneDnnSplitMatmul
    monkeypatch.setattr(OneDnnSplitMatmul, "__call__", lambda self, x, dtype: x.float())
    int8_matmul.cache_clear()
    assert int8_matmul("cpu") is IntMmMatmul
    monkeypatch.setattr(IntMmMatmul, "__call__", lambda self, x, dtype: torch.zeros(x.shape[0], 24))
    int8_matmul.cache_clear()
    with pytest.raises(RuntimeError, match="no exact int8 matrix product"):
        int8_matmul("cpu")
    int8_matmul.cache_clear()


def test_rounding_known_answer() -> None:
    x = torch.tensor([[1.27, -1.27, 0.004, 0.006, -0.016, 9.0, -9.0]])
    assert quantize_symmetric(x, torch.tensor(0.01)).tolist() == [[127, -127, 0, 1, -2, 127, -128]]
    weight = torch.tensor([[2.54, -1.0], [0.0, 0.0]])
    scale = find_grid(weight, 8).scale[:, 0]
    torch.testing.assert_close(scale[0], torch.tensor(0.02))
    assert (scale > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_unpacked_and_is_close_to_float(scheme: ActivationScheme, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    x = torch.randn(3, 11, 96).to(dtype)
    layer = QuantizedLinear.from_float(linear, scheme)
    with torch.inference_mode():
        unpacked = layer(x)
        layer.pack()
        layer.pack()
        packed = layer(x)
        expected = linear(x.float())
    assert packed.dtype == dtype
    assert torch.equal(packed, unpacked)
    assert (packed.float() - expected).abs().max() < 0.02 * expected.abs().max() + (0.02 if dtype == torch.bfloat16 else 0)


def test_it_computes_on_integers_and_not_on_rounded_floats() -> None:
    """Activations are rounded to 8 bits too: the result is that of the integers, to float32's own rounding."""
    torch.manual_seed(1)
    linear = nn.Linear(64, 32)
    x = torch.randn(5, 64)
    layer = QuantizedLinear.from_float(linear, ActivationScheme.DYNAMIC_PER_TOKEN)
    assert layer.weight is not None
    scale = x.abs().amax(dim=1, keepdim=True) / QMAX
    integers = torch.round(x / scale).long() @ layer.weight.long().t()
    expected = integers.double() * scale.double() * layer.weight_scale.double() + linear.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)
    weight_only = x @ (layer.weight.float() * layer.weight_scale[:, None]).t() + linear.bias
    assert (layer(x) - weight_only).abs().max() > 1e-4


def test_per_token_scales_keep_small_rows_that_a_tensor_scale_loses() -> None:
    linear = nn.Linear(16, 8, bias=False)
    x = torch.stack([torch.full((16,), 1000.0), torch.full((16,), 0.01)])
    exact = linear(x)
    per_token = QuantizedLinear.from_float(linear, ActivationScheme.DYNAMIC_PER_TOKEN)(x)
    per_tensor = QuantizedLinear.from_float(linear, ActivationScheme.DYNAMIC_PER_TENSOR)(x)
    assert (per_token[1] - exact[1]).abs().max() < 0.02 * exact[1].abs().max()
    assert (per_tensor[1] == 0).all()


def test_static_scale_is_used_as_given() -> None:
    static = QuantizedLayer(bits=8, activations=ActivationScheme.STATIC_PER_TENSOR)
    layer = QuantizedLinear(static, 4, torch.eye(4, dtype=torch.int8) * 10, torch.ones(4), input_scale=torch.tensor(0.5))
    assert layer(torch.tensor([[1.0, 0.6, 1000.0, 0.0]])).tolist() == [[10.0, 5.0, 127 * 5.0, 0.0]]


def test_no_rows_zero_rows_and_one_token() -> None:
    layer = QuantizedLinear.from_float(nn.Linear(8, 4), ActivationScheme.DYNAMIC_PER_TOKEN)
    assert layer(torch.zeros(0, 8)).shape == (0, 4)
    torch.testing.assert_close(layer(torch.zeros(1, 8))[0], layer.bias)


def test_wrong_parts_are_refused() -> None:
    integers, scale = torch.zeros(2, 2, dtype=torch.int8), torch.ones(2)
    with pytest.raises(ValueError, match=r"int8 weights of 2 inputs are torch.int8 \[out, 2\]"):
        QuantizedLinear(QuantizedLayer(bits=8), 2, torch.zeros(2, 2), scale)
    with pytest.raises(ValueError, match="static scheme"):
        QuantizedLinear(QuantizedLayer(bits=8, activations=ActivationScheme.STATIC_PER_TENSOR), 2, integers, scale)
    with pytest.raises(ValueError, match="zeros belong to grids that are not symmetric"):
        QuantizedLinear(QuantizedLayer(bits=8, symmetric=False), 2, integers.view(torch.uint8), scale)
    with pytest.raises(ValueError, match="input_factor"):
        QuantizedLinear(QuantizedLayer(bits=8, input_factor=True), 2, integers, scale)
    wrong = QuantizedLayer(bits=4, group_size=8, activations=ActivationScheme.DYNAMIC_PER_TOKEN)
    with pytest.raises(ValueError, match="one scale per output channel"):
        QuantizedLinear(wrong, 2, torch.zeros(2, 1, dtype=torch.uint8), scale)


def test_onednn_linear_is_the_linear_layer() -> None:
    linear = nn.Linear(33, 17)
    x = torch.randn(2, 9, 33)
    with torch.inference_mode():
        torch.testing.assert_close(OneDnnLinear(linear, torch.float32)(x), linear(x), rtol=1e-5, atol=1e-6)


def test_cast_embedding_looks_up_and_casts() -> None:
    table = nn.Embedding(10, 4).half()
    looked_up = CastEmbedding(table, torch.float32)(torch.tensor([[3, 9]]))
    assert looked_up.dtype == torch.float32
    assert torch.equal(looked_up, table.weight[[3, 9]].float()[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 16, False), (4, None, True), (8, None, True), (3, 32, True)])
def test_unpacked_weights_give_the_same_products_bit_for_bit(
    dtype: torch.dtype, bits: int, group_size: int | None, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 96)
    layer = QuantizedLinear.from_float(linear, ActivationScheme.NONE, bits, group_size=group_size, symmetric=symmetric)
    inputs = [torch.randn(*size, 64).to(dtype) for size in ((1,), (1, 3), (2, 17), (1100,))]
    layer.pack()
    expected = [layer(x) for x in inputs]
    assert layer.unpacked_bytes(dtype) == 64 * 96 * dtype.itemsize
    layer.unpack(dtype)
    monkeypatch.setattr(QuantizedLinear, "dequantized", lambda *_: pytest.fail("unpacked once more"))
    for _ in range(2):
        layer.unpack(dtype)
        assert all(torch.equal(layer(x), y) for x, y in zip(inputs, expected, strict=True))
    assert layer.weight is None  # in memory once


def test_an_unpacked_layer_still_divides_its_input() -> None:
    torch.manual_seed(0)
    grid = find_grid(torch.randn(24, 32), 4, 16)
    integers = torch.randint(0, 16, (24, 32), dtype=torch.uint8)
    layer = QuantizedLinear.from_integers(integers, grid, None, input_factor=torch.rand(32) + 0.5)
    x = torch.randn(5, 32)
    expected = layer(x)
    layer.unpack(torch.float32)
    assert torch.equal(layer(x), expected)


def test_layers_that_multiply_integers_have_nothing_to_unpack() -> None:
    layer = QuantizedLinear.from_float(nn.Linear(32, 16), ActivationScheme.DYNAMIC_PER_TOKEN)
    x = torch.randn(3, 32)
    expected = layer(x)
    layer.unpack(torch.float32)
    assert layer.unpacked_bytes(torch.float32) == 0
    assert layer.weight is not None
    assert torch.equal(layer(x), expected)


PER_GROUP = ActivationScheme.DYNAMIC_PER_GROUP


def test_groups_round_to_a_scale_of_their_own() -> None:
    x = torch.tensor(
        [[127.0, 0.5, 1.5, -2.5, 0.0, 0.0, 0.0, 0.0, 254.0, 1.0], [-1.27, 0.0, 0.004, 0.006, 1e-42, 0, 0, 0, 3.0, 1.0]]
    )
    rounded = round_groups(x, 4)  # the last group has two inputs
    expected = [[127, 0, 2, -2, 0, 0, 0, 0, 254, 0], [-1.27, 0, 0, 0.01, 0, 0, 0, 0, 3.0, 42 * 3 / 127]]
    torch.testing.assert_close(rounded, torch.tensor(expected), rtol=1e-6, atol=1e-41)
    assert round_groups(x.bfloat16(), 4).dtype == torch.bfloat16
    assert round_groups(x[:0], 4).shape == (0, 10)


@pytest.mark.parametrize(("bits", "symmetric", "inputs"), [(4, True, 64), (4, False, 64), (8, True, 64), (3, False, 56)])
def test_activations_by_group_multiply_the_integers_of_both(bits: int, symmetric: bool, inputs: int) -> None:
    """The known answer: sums of integers for each group, scaled by the group's two scales, in float64."""
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 24), 3 * torch.randn(2, 9, inputs)
    layer = QuantizedLinear.from_float(linear, PER_GROUP, bits, group_size=16, symmetric=symmetric)
    expected = linear.bias.detach().double().repeat(2, 9, 1)
    for group, start in enumerate(range(0, inputs, 16)):
        own = x[..., start : start + 16]
        step = own.abs().amax(dim=-1, keepdim=True)
        integers = torch.round(own * (QMAX / step)).double()
        weight = layer.integers()[:, start : start + 16].double() - layer.zeros()[:, group, None].double()
        expected += (integers @ weight.t()) * (step / QMAX).double() * layer.weight_scale[:, group].double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert (x @ layer.dequantized().t() + linear.bias - layer(x)).abs().max() > 1e-3  # what it is without the rounding


def test_activations_by_group_are_rounded_however_the_layer_is_held() -> None:
    torch.manual_seed(0)
    layers = [QuantizedLinear.from_float(nn.Linear(64, 24), PER_GROUP, 4, group_size=32) for _ in range(2)]
    x = torch.randn(5, 64)
    expected = [layer(x) for layer in layers]
    assert layers[0].unpacked_bytes(torch.float32) == 64 * 24 * 4
    layers[0].pack()
    layers[0].unpack(torch.float32)
    held = layers[1].held(torch.float32)
    assert torch.equal(layers[0](x), expected[0])
    assert torch.equal(held(x), expected[1])


def test_activations_by_group_need_a_group() -> None:
    with pytest.raises(ValueError, match="activations with a scale per group need weights with a group size"):
        QuantizedLinear.from_float(nn.Linear(32, 8), PER_GROUP, 4)
