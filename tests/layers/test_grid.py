"""Grids: nearest values, ends that reach, groups of their own, a search that never makes it worse."""

from __future__ import annotations

import pytest
import torch

from compress.layers.grid import find_grid

SHAPES = [(1, 1), (3, 7), (5, 64), (17, 100), (600, 513)]


def weight_of(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (0.1 + torch.rand(shape[0], 1, generator=generator))


def error(weight: torch.Tensor, **settings) -> float:
    grid = find_grid(weight, **settings)
    return float((grid.values(grid.round(weight)) - weight).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 8, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_each_weight_goes_to_the_nearest_value(shape, bits: int, group_size: int | None, symmetric: bool) -> None:
    weight = weight_of(shape)
    grid = find_grid(weight, bits, group_size, symmetric)
    integers = grid.round(weight)
    group = grid.group_of(shape[1])
    scale, zero = grid.scale[:, group], grid.zero[:, group]
    # Written again, plainly: all the values of the grid, and the nearest of them.
    levels = torch.arange(1 if bits == 8 and symmetric else 0, 2**bits)
    values = (levels - zero[..., None]) * scale[..., None]
    nearest = (values - weight[..., None]).abs().amin(dim=-1)
    made = grid.values(integers)
    torch.testing.assert_close((made - weight).abs(), nearest, rtol=1e-4, atol=1e-6)
    # Nothing is clipped by more than what half precision makes of the scale, at the far end of the grid.
    assert (nearest <= scale * (0.5 + 2**bits * 2**-10) + 1e-6).all()
    assert grid.zero.min() >= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_search_lowers_the_error_it_looks_at(symmetric: bool) -> None:
    weight = weight_of((64, 256))
    plain = error(weight, bits=4, group_size=64, symmetric=symmetric)
    assert error(weight, bits=4, group_size=64, symmetric=symmetric, search=True) < 0.97 * plain
    importance = torch.zeros(256)
    importance[::64] = 1  # one weight of each group counts, so it is hit where a whole range of scales is tried
    grid = find_grid(weight, 4, 64, symmetric, search=True, importance=importance)
    looked_at = (grid.values(grid.round(weight)) - weight)[:, ::64].square().sum()
    unweighted = find_grid(weight, 4, 64, symmetric, search=True)
    assert looked_at < 0.2 * (unweighted.values(unweighted.round(weight)) - weight)[:, ::64].square().sum()


def test_groups_are_scaled_apart_and_zero_groups_stay_zero() -> None:
    weight = torch.cat([torch.full((2, 8), 1000.0), torch.full((2, 8), 1e-3), torch.zeros(2, 8)], dim=1)
    for symmetric in (True, False):
        grid = find_grid(weight, 4, 8, symmetric)
        torch.testing.assert_close(grid.values(grid.round(weight)), weight, rtol=2e-3, atol=1e-7)


def test_negative_and_positive_constants_survive_without_symmetry() -> None:
    weight = torch.tensor([[0.5] * 8, [-0.5] * 8])
    grid = find_grid(weight, 4, 8, symmetric=False)
    torch.testing.assert_close(grid.values(grid.round(weight)), weight, rtol=1e-3, atol=0)


def test_a_scale_beyond_half_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit into half precision"):
        find_grid(torch.full((1, 8), 1e6), 4, 8)
