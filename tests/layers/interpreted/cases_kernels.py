"""Each Triton kernel against its reference in torch, in Triton's interpreter; `tests/layers/test_kernels.py` runs this file."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.layers import float8_linear
from compress.layers.float8_linear import Float8Linear, to_float8
from compress.layers.grid import find_grid
from compress.layers.int8_matmul import int8_matmul, is_exact
from compress.layers.kernels import products, rows, weights
from compress.layers.kernels.choice import rounded_input, row_kernels, weight_kernels
from compress.layers.kernels.tiles import Tile
from compress.layers.quantized_linear import QMAX, QuantizedLinear, quantize_symmetric
from compress.layers.scheme import ActivationScheme, Numbers

INTEGER, FLOAT8 = Numbers.INTEGER, Numbers.FLOAT8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (0, 24), (3, 37), (5, 64), (2, 1030)]
SMALL = Tile(16, 16, 32, 4, 2)


def sample(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


def by_hand(x: torch.Tensor, numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows as the layers do without kernels."""
    if not len(x):
        return torch.empty(x.shape), torch.empty((0, 1))
    if numbers is FLOAT8:
        values, scale = to_float8(x)
        return values.float(), scale
    scale = x.abs().amax(dim=1, keepdim=True).float().div_(QMAX).clamp_min_(1e-7)
    return quantize_symmetric(x, scale).float(), scale


def assert_rounded(found: rows.Rounded, x: torch.Tensor, numbers: Numbers) -> None:
    values, scale = by_hand(x, numbers)
    assert found.numbers is numbers
    assert found.values.dtype == (torch.int8 if numbers is INTEGER else torch.float8_e4m3fn)
    assert torch.equal(found.values.float(), values)
    assert torch.equal(found.scale, scale)


def test_the_kernels_of_this_process_are_chosen() -> None:
    assert row_kernels("cpu") is rows
    assert weight_kernels("cpu") is weights
    assert int8_matmul("cpu") is products.TritonMatmul
    assert is_exact(products.TritonMatmul, torch.device("cpu"))


def test_a_card_without_e4m3_keeps_the_kernels_for_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before compute capability 8.9, Triton compiles no kernel that writes E4M3."""
    right = rows.quantize

    def quantize(x: torch.Tensor, numbers: Numbers) -> rows.Rounded:
        if numbers is FLOAT8:
            raise RuntimeError("type fp8e4nv not supported in this architecture")
        return right(x, numbers)

    monkeypatch.setattr(rows, "quantize", quantize)
    assert row_kernels.__wrapped__("cpu", INTEGER) is rows
    assert row_kernels.__wrapped__("cpu", FLOAT8) is None


def test_kernels_that_round_wrongly_are_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rows.quantize
    monkeypatch.setattr(rows, "quantize", lambda x, numbers: right(x + 1, numbers))
    assert row_kernels.__wrapped__("cpu", INTEGER) is None
    assert row_kernels.__wrapped__("cpu", FLOAT8) is None
    monkeypatch.setattr(weights, "unpacked", lambda packed, dtype: torch.zeros(8, 128, dtype=dtype))
    assert weight_kernels.__wrapped__("cpu") is None
    monkeypatch.setattr(products.TritonMatmul, "__call__", lambda self, x, dtype: torch.zeros(x.shape[0], 24))
    assert not is_exact(products.TritonMatmul, torch.device("cpu"))


@pytest.mark.parametrize("numbers", [INTEGER, FLOAT8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows_round_as_the_layers_do(size: tuple[int, int], dtype: torch.dtype, numbers: Numbers) -> None:
    x = sample(*size, dtype=dtype)
    assert_rounded(rows.quantize(x, numbers), x, numbers)


@pytest.mark.parametrize("numbers", [INTEGER, FLOAT8])
def test_a_zero_row_tiny_and_huge_values(numbers: Numbers) -> None:
    x = sample(4, 40)
    x[0], x[1], x[2] = 0.0, x[1] * 1e-12, x[2] * 1e37
    assert_rounded(rows.quantize(x, numbers), x, numbers)


def test_every_value_of_e4m3_and_every_tie() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = values[values.isfinite()].sort().values
    x = torch.cat((values, (values[1:] + values[:-1]) / 2, (values[1:] * 3 + values[:-1]) / 4))[None]  # the scale is 1
    assert_rounded(rows.quantize(x, FLOAT8), x, FLOAT8)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("numbers", [INTEGER, FLOAT8])
def test_a_row_that_is_not_finite_gives_a_row_of_nan_and_no_other(numbers: Numbers, broken: float) -> None:
    x = sample(3, 33)
    x[1, 7] = broken
    found = rows.quantize(x, numbers)
    assert found.scale.isnan().flatten().tolist() == [False, True, False]
    linear = nn.Linear(33, 16)
    dynamic = ActivationScheme.DYNAMIC_PER_TOKEN
    layer = QuantizedLinear.from_float(linear, dynamic) if numbers is INTEGER else Float8Linear.from_float(linear, dynamic)
    assert layer(x).isnan().all(dim=1).tolist() == [False, True, False]


def test_rows_of_a_view_and_rows_too_wide() -> None:
    x = sample(6, 90)[:, 10:50]
    assert_rounded(rows.quantize(x, INTEGER), x, INTEGER)
    with pytest.raises(ValueError, match="65,536"):
        rows.quantize(torch.zeros(1, rows.WIDEST + 1), INTEGER)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 24), (1, 37), (3, 2, 64)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(size: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    x, kind = sample(*size, dtype=dtype) + 2, rows.NormKind(centred=True, rounds_first=False)
    weight, offset = sample(size[-1], dtype=dtype, seed=1), sample(size[-1], dtype=dtype, seed=2) if bias else None
    y, rounded = rows.normalize(x, weight, offset, 1e-5, kind, INTEGER)
    expected = F.layer_norm(x.float(), size[-1:], weight.float(), None if offset is None else offset.float(), 1e-5)
    assert y.shape == x.shape
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert rounded is not None
    assert_rounded(rounded, y.view(-1, size[-1]), INTEGER)
    assert rows.normalize(x, weight, offset, 1e-5, kind)[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [None, INTEGER, FLOAT8])
@pytest.mark.parametrize(("first", "offset"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_rms_norm(dtype: torch.dtype, numbers: Numbers | None, first: bool, offset: float) -> None:
    x, weight = sample(5, 37, dtype=dtype), sample(37, dtype=dtype, seed=1)
    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = weight * normal.to(dtype) if first else (normal * (offset + weight.float())).to(dtype)
    y, rounded = rows.normalize(x, weight, None, 1e-6, rows.NormKind(False, first, offset), numbers)
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
    if numbers is not None:
        assert rounded is not None
        assert_rounded(rounded, y, numbers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(0, 48), (1, 2), (3, 74), (2, 2, 64)])
def test_gated_products(size: tuple[int, ...], dtype: torch.dtype) -> None:
    x = sample(*size, dtype=dtype)
    gate, up = x.chunk(2, dim=-1)
    y = rows.gated(x)
    torch.testing.assert_close(y, F.silu(gate) * up, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    for numbers in (INTEGER, FLOAT8):
        assert_rounded(rows.gated_rounded(x, numbers), y.view(-1, y.shape[-1]), numbers)
    large = torch.tensor([[-1e30, 1e30, -90.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(rows.gated(large), torch.tensor([[0.0, 1e30, 0.0]]), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize(("count", "inputs", "outputs"), [(1, 16, 1), (3, 48, 5), (33, 96, 40), (70, 64, 17)])
def test_int8_products_are_exact(count: int, inputs: int, outputs: int, descriptors: bool) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randint(-128, 128, (count, inputs), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
    ones = torch.ones((count, 1)), torch.ones(outputs)
    tile = Tile(16, 16, 32, 4, 2, descriptors)
    y = products.int8_product(x, weight, *ones, None, torch.float32, tile)
    assert torch.equal(y.long(), x.long() @ weight.long().t())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [37, 64])
def test_int8_products_scale_by_row_and_column_and_add(dtype: torch.dtype, inputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (19, inputs), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (21, inputs), dtype=torch.int8, generator=generator)
    x_scale, scale = torch.rand((19, 1), generator=generator) / 100, torch.rand(21, generator=generator)
    bias = sample(21, dtype=dtype)
    exact = (x.long() @ weight.long().t()).double()
    for row_scale in (x_scale, torch.tensor(0.005)):
        y = products.int8_product(x, weight, row_scale, scale, bias, dtype, SMALL)
        expected = exact * scale.double() * row_scale.double() + bias.double()
        torch.testing.assert_close(y.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-3)
        assert y.dtype == dtype


def test_int8_products_of_no_rows_and_of_the_largest_values() -> None:
    weight, one = torch.full((8, 4096), -128, dtype=torch.int8), torch.ones(())
    assert products.int8_product(
        torch.zeros((0, 4096), dtype=torch.int8), weight, one, torch.ones(8), None, torch.float32
    ).shape == (0, 8)
    x = torch.full((2, 4096), -128, dtype=torch.int8)
    y = products.int8_product(x, weight, one, torch.ones(8), None, torch.float32)
    assert (y == 4096 * 128 * 128).all()


def packed_of(layer: QuantizedLinear) -> weights.PackedWeight:
    packed: weights.PackedWeight = layer._packed_weight()
    return packed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("group_size", "inputs"), [(None, 64), (32, 64), (24, 37), (None, 37)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_decode_exactly_and_multiply(bits: int, group_size: int | None, inputs: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, 21)
    layer = QuantizedLinear.from_float(linear, ActivationScheme.NONE, bits, group_size=group_size, symmetric=symmetric)
    packed = packed_of(layer)
    for dtype in DTYPES:
        assert torch.equal(weights.unpacked(packed, dtype), layer.dequantized(dtype))
    for count in (1, 5, 17):
        x = sample(count, inputs)
        expected = x @ layer.dequantized().t() + linear.bias
        torch.testing.assert_close(weights.few_token_product(x, packed, layer.bias), expected, rtol=1e-5, atol=1e-5)
    half = sample(3, inputs, dtype=torch.bfloat16)
    expected = half.float() @ layer.dequantized(torch.bfloat16).float().t()
    torch.testing.assert_close(weights.few_token_product(half, packed).float(), expected, rtol=8e-3, atol=1e-2)
    assert weights.few_token_product(torch.zeros(0, inputs), packed).shape == (0, 21)


def test_a_layer_multiplies_few_and_many_tokens_and_is_told_apart_by_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 24), sample(2, 5, 48)
    layer = QuantizedLinear.from_float(linear, ActivationScheme.NONE, 4, group_size=16)
    layer.pack()
    few = layer(x)
    monkeypatch.setattr(weights, "FEW_TOKENS", 4)
    many = layer(x)
    expected = x @ layer.dequantized().t() + linear.bias
    torch.testing.assert_close(few, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(many, expected, rtol=1e-5, atol=1e-5)
    layer.unpack(torch.float32)
    monkeypatch.setattr(weights, "unpacked", lambda *_: pytest.fail("unpacked in a call"))
    assert torch.equal(layer(x), many)
    monkeypatch.setattr(weights, "FEW_TOKENS", 64)
    assert torch.equal(layer(x), few)  # a kernel reads the packed weight still


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [QuantizedLinear, Float8Linear])
def test_layers_give_what_they_give_without_kernels(kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(37, 24), sample(2, 5, 37, dtype=dtype)
    layer = kind.from_float(linear, ActivationScheme.DYNAMIC_PER_TOKEN)
    found = layer(x)
    for place in ("compress.layers.quantized_linear", "compress.layers.float8_linear"):
        monkeypatch.setattr(f"{place}.row_kernels", lambda *_: None)
    torch.testing.assert_close(found, layer(x), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_fp8_products_pass_both_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The card's product is called once with a scale for each row and each column, and nothing is multiplied after it."""
    calls = []

    def product(a, b, scale_a, scale_b, out_dtype, use_fast_accum):
        calls.append((scale_a.shape, scale_b.shape, out_dtype, use_fast_accum))
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(float8_linear, "has_float8_products", lambda *_: True)
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 48, bias=False), sample(5, 32, dtype=torch.bfloat16)
    layer = Float8Linear.from_float(linear, ActivationScheme.DYNAMIC_PER_TOKEN)
    found = layer(x)
    assert calls == [(torch.Size([5, 1]), torch.Size([1, 48]), torch.bfloat16, True)]
    monkeypatch.setattr(float8_linear, "has_float8_products", lambda *_: False)
    torch.testing.assert_close(found, layer(x), rtol=1e-2, atol=1e-2)
    assert len(calls) == 1


def test_only_a_norm_s_own_output_carries_its_rounded_form() -> None:
    x = sample(3, 32)
    first = rounded_input(x, INTEGER, rows)
    assert rounded_input(x, INTEGER, rows) is not first
    x.mul_(2)
    assert not torch.equal(rounded_input(x, INTEGER, rows).scale, first.scale)


def test_grids_are_found_on_any_device_in_chunks_of_its_size() -> None:
    weight = sample(70, 33)
    assert torch.equal(find_grid(weight, 4).scale, weight.abs().amax(dim=1, keepdim=True) / 7)
