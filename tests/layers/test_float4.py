"""MXFP4 and NVFP4: bits and scales are those of compressed-tensors, and a layer multiplies what its bits stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from compress.layers.empty import empty_layer
from compress.layers.float4 import find_float4_grid, of_codes, to_codes
from compress.layers.float4_linear import Float4Linear, float4_layer
from compress.layers.scheme import FLOAT4_GROUPS, ActivationScheme, Numbers

MXFP4, NVFP4 = Numbers.MXFP4, Numbers.NVFP4
VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
# What compressed-tensors 0.20.0 makes of `crafted()`, row by row: packed weights, scales (E8M0; E4M3), and NVFP4's global scale.
REFERENCE: dict[Numbers, Any] = {
    MXFP4: (
        ["8ee6724cafe6603dc7f56a1ed7f45b9e", "e6724cafe5602dc7f46a1ed6735c9fe6", "000000000000000080224ce6077823f0"],
        ["7e", "74", "7f"],
        None,
    ),
    NVFP4: (
        ["9fe6724dafe6703ec7f4691ed6f35b9e", "e6724cafe5602dc7f46a1ed6735b9ee6", "000000000000000080224ce6077823f0"],
        ["7577", "2627", "207e"],
        448.0,
    ),
}


def crafted() -> torch.Tensor:
    """Three rows of 32 weights: large, small, and half zeros next to values in the middle of two; exact in float32."""
    weight = ((torch.arange(96) * 37 + 11) % 101 - 50).float().view(3, 32) / 16
    weight[1] /= 1024
    weight[2, :16] = 0
    ties = [0.25, -0.25, 0.75, 1.25, -1.75, 2.5, 3.5, -5.0, 6.0, 0.1, -0.1, 5.1, 1.3, 0.8, -0.0, -6.0]
    weight[2, 16:] = torch.tensor(ties)
    return weight


def layer_of(weight: torch.Tensor, numbers: Numbers, bias: torch.Tensor | None = None) -> Float4Linear:
    grid = find_float4_grid(weight, numbers)
    return Float4Linear.from_codes(grid.round(weight), grid, bias)


def stored(layer: Float4Linear) -> tuple[list[str], list[str], float | None]:
    assert layer.weight is not None
    rows = [[bytes(row.tolist()).hex() for row in tensor.view(torch.uint8)] for tensor in (layer.weight, layer.weight_scale)]
    return rows[0], rows[1], None if layer.weight_global_scale is None else float(layer.weight_global_scale)


def test_values_go_to_the_nearest_and_ties_to_the_even_mantissa() -> None:
    exact = torch.tensor([value * sign for sign in (1, -1) for value in VALUES])
    assert to_codes(exact[:8]).tolist() == list(range(8))
    assert to_codes(exact[9:]).tolist() == list(range(9, 16))
    assert torch.equal(of_codes(torch.arange(16, dtype=torch.uint8)), exact)
    middles = {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 1e9: 6}
    assert of_codes(to_codes(torch.tensor(list(middles)))).tolist() == list(middles.values())
    assert of_codes(to_codes(-torch.tensor(list(middles)))).tolist() == [-value for value in middles.values()]
    drawn = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 14 - 7
    nearest = exact[(drawn[:, None] - exact).abs().argmin(dim=1)]
    assert torch.equal(of_codes(to_codes(drawn)), nearest)


@pytest.mark.parametrize("numbers", list(FLOAT4_GROUPS))
def test_bits_and_scales_are_compressed_tensors_own(numbers: Numbers) -> None:
    assert stored(layer_of(crafted(), numbers)) == REFERENCE[numbers]


@pytest.mark.parametrize("numbers", list(FLOAT4_GROUPS))
@pytest.mark.parametrize("spread", [0.0, 2.0, 8.0, None])
def test_bits_are_those_that_an_installed_compressed_tensors_makes(numbers: Numbers, spread: float | None) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors.base", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 160, generator=draw) * torch.exp((spread or 0) * torch.randn(40, 1, generator=draw))
    weight[3] = 0
    weight = crafted() if spread is None else weight
    scheme = preset_name_to_scheme(f"{numbers.name}A16", ["Linear"])
    whole = generate_gparam(weight.min(), weight.max()) if numbers is NVFP4 else None
    groups = weight.unflatten(1, (-1, FLOAT4_GROUPS[numbers]))
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=whole)
    state = {"weight": weight, "weight_scale": scale} | ({} if whole is None else {"weight_global_scale": whole})
    theirs = compressors.BaseCompressor.get_value_from_registry(f"{numbers}-pack-quantized")
    made = theirs.compress(state, scheme)
    ours = layer_of(weight, numbers)
    assert torch.equal(ours.weight, made["weight_packed"])
    assert ours.weight_scale.dtype == made["weight_scale"].dtype
    assert torch.equal(ours.weight_scale.view(torch.uint8), made["weight_scale"].view(torch.uint8))
    if whole is not None:
        assert torch.equal(ours.weight_global_scale.view(1), made["weight_global_scale"])
    back = theirs.decompress(made, scheme)["weight"]  # in bfloat16
    assert torch.equal(ours.dequantized(back.dtype).view(torch.int16), back.view(torch.int16))


def test_a_power_of_two_scales_a_group_of_32() -> None:
    weight = torch.zeros(1, 96)
    weight[0, 5], weight[0, 40], weight[0, 70] = 6.9, 7.0, -0.011
    layer = layer_of(weight, MXFP4)
    # 6.9 is clipped to 6; 7 would be rounded to 8, and is with twice the scale; -0.011 is -1.408 x 2^-7, and goes to -6 / 4 x 2^-7.
    assert layer.weight_scale.tolist() == [[127, 128, 127 - 7 - 2]]
    assert [float(layer.values()[0, place]) for place in (5, 40, 70)] == [6, 8, -6 / 4 * 2**-7]


def test_the_largest_weight_of_nvfp4_is_kept() -> None:
    weight = torch.linspace(-3, 2, 64).view(2, 32)
    layer = layer_of(weight, NVFP4)
    assert float(layer.weight_global_scale) == 448 * 6 / 3
    assert float(layer.weight_scale.float().max()) == 448
    assert float(layer.values()[0, 0]) == -3
    size = weight.abs().view(2, 2, 16).amax(dim=2)
    # A scale in E4M3 is off by 1 / 16 at most, and the widest step of E2M1 is 2 of 6.
    assert ((layer.values() - weight).abs().view(2, 2, 16).amax(dim=2) <= size * (1 / 6 * 17 / 16 + 1 / 16)).all()


@pytest.mark.parametrize("numbers", list(FLOAT4_GROUPS))
@pytest.mark.parametrize("inputs", [64, 37])
def test_a_layer_multiplies_what_is_stored(numbers: Numbers, inputs: int) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(inputs, 24), torch.randn(2, 5, inputs)
    weight = linear.weight.detach()
    grid = find_float4_grid(weight, numbers)
    layer = layer_of(weight, numbers, linear.bias)
    expected = of_codes(grid.round(weight)) * grid.scale[:, grid.group_of(inputs)]
    assert torch.equal(layer.values(), expected)
    assert torch.equal(grid.values(grid.round(weight)), expected)
    assert torch.equal(layer.dequantized(torch.bfloat16), expected.bfloat16())
    torch.testing.assert_close(layer(x), x @ expected.t() + linear.bias, rtol=1e-5, atol=1e-5)
    again = empty_layer(linear, layer.layer)
    kept = {name: (tensor.shape, tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in again.state_dict().items()} == kept
    for name, tensor in layer.state_dict().items():
        setattr(again, name, tensor)
    assert torch.equal(again(x), layer(x))
    torch.testing.assert_close(layer.held(torch.float32)(x), layer(x), rtol=1e-5, atol=1e-5)
    before = layer(x)
    assert layer.unpacked_bytes(torch.float32) == 24 * inputs * 4
    layer.unpack(torch.float32)
    assert layer.weight is None
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("numbers", list(FLOAT4_GROUPS))
def test_what_is_not_the_format_is_refused(numbers: Numbers) -> None:
    layer = layer_of(torch.ones(2, 32), numbers)
    parts = (layer.weight, layer.weight_scale, layer.weight_global_scale, None)
    described = float4_layer(numbers)
    assert (described.bits, described.group_size, described.name) == (4, {MXFP4: 32, NVFP4: 16}[numbers], numbers)
    for change in ({"group_size": 64}, {"bits": 8}, {"symmetric": False}, {"activations": ActivationScheme.DYNAMIC_PER_TOKEN}):
        with pytest.raises(ValueError, match="weights have other bits"):
            Float4Linear(described.model_copy(update=change), 32, *parts)
    with pytest.raises(ValueError, match="of 40 inputs do not take"):
        Float4Linear(described, 40, *parts)
    other = MXFP4 if numbers is NVFP4 else NVFP4
    with pytest.raises(ValueError, match=f"{other} has no scales in"):
        Float4Linear(float4_layer(other), 32, *parts)
