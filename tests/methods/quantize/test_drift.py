"""GPTQ with targets corrected for the drift of its inputs, against the least-squares solution column by column."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import compress_to, network_of

from compress.calibration.statistics import Drift, Hessian
from compress.common.errors import UserError
from compress.layers.grid import Grid, find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.error_feedback import drift_correction, factor
from compress.methods.prune.width import Width
from compress.methods.quantize.gptq import GPTQ, round_with_feedback
from compress.pipeline.recipe_file import parse_recipe

CPU = torch.device("cpu")
DAMPING = 0.01


def drifted(inputs: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of a layer as the changed layers before it make them, and as they should be: channels that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    exact = torch.randn(tokens, inputs, generator=generator) @ (mixing + torch.eye(inputs))
    turned = torch.eye(inputs) + 0.1 * torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    return 0.9 * exact @ turned + 0.1 * torch.randn(tokens, inputs, generator=generator), exact


def column_by_column(weight: torch.Tensor, given: torch.Tensor, exact: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The columns are rounded one after another; the others are solved for anew each time, by least squares, in float64.

    The objective is |W Z - V X|^2 / tokens + damping * |V - W|^2 with Z the exact inputs, X the given ones, V the new weight.
    """
    w, x, z = (tensor.double() for tensor in (weight, given, exact))
    inputs, tokens = w.shape[1], len(x)
    damping = DAMPING * float(x.square().mean())
    order = x.square().mean(dim=0).float().argsort(descending=True, stable=True)
    group = grid.group_of(inputs)
    # As one problem of plain least squares: rows of the damping after those of the tokens.
    left = torch.cat([x / tokens**0.5, damping**0.5 * torch.eye(inputs, dtype=torch.float64)])
    right = torch.cat([z @ w.t() / tokens**0.5, damping**0.5 * w.t()])
    integers = torch.empty(weight.shape, dtype=torch.uint8)
    for place, column in enumerate(order):
        free = order[place:]
        solved = torch.linalg.lstsq(left[:, free], right).solution[0]
        scale, zero = grid.scale[:, group[column]].double(), grid.zero[:, group[column]].double()
        steps = ((solved / scale).round() + zero).clamp(grid.lowest, grid.highest)
        integers[:, column] = steps.to(torch.uint8)
        right -= left[:, column, None] * ((steps - zero) * scale)[None]
    return integers


def gathered(given: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moment and drift, a few rows at a time."""
    statistic = Drift(given.shape[1], CPU)
    for rows in torch.arange(len(given)).split(37):
        statistic.add(given[rows], torch.ones(len(rows)), exact[rows])
    return statistic.moment(), statistic.drift()


def test_the_drift_is_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Drift, "ROWS", 64)
    given, exact = drifted(19, 201)
    counts = torch.rand(201)
    statistic, hessian = Drift(19, CPU), Hessian(19, CPU)
    for rows in torch.arange(201).split(23):
        statistic.add(given[rows], counts[rows], exact[rows])
        hessian.add(given[rows], counts[rows])
    expected = ((exact - given).double() * counts[:, None]).t() @ given.double() / counts.sum()
    torch.testing.assert_close(statistic.drift().double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(statistic.moment(), hessian.mean())


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 16, False), (3, None, True)])
def test_it_is_least_squares_column_by_column(bits: int, group_size: int | None, symmetric: bool) -> None:
    given, exact = drifted(48, 400)
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    moment, drift = gathered(given, exact)
    feedback = factor(moment, DAMPING, act_order=True)
    target = torch.addmm(weight, weight, drift_correction(drift, feedback))
    grid = find_grid(target, bits, group_size, symmetric)
    ours = round_with_feedback(weight, grid, feedback, target=target)
    theirs = column_by_column(weight, given, exact, grid)

    def loss(integers: torch.Tensor) -> torch.Tensor:
        return (exact @ weight.t() - given @ grid.values(integers).t()).square().sum(dim=0)

    better = loss(theirs) < loss(grid.round(weight))
    assert better.sum() > 20
    assert (ours == theirs)[better].float().mean() > 0.99  # where a value lies between two integers, float32 and float64 may part
    without = round_with_feedback(weight, grid, feedback)
    assert loss(ours).sum() < 0.8 * loss(without).sum()
    assert (loss(ours) <= loss(grid.round(weight)) * (1 + 1e-3)).all()


def test_without_drift_it_is_gptq_to_the_last_bit() -> None:
    given, _ = drifted(48, 400)
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(1))
    moment, drift = gathered(given, given)
    feedback = factor(moment, DAMPING, act_order=True)
    target = torch.addmm(weight, weight, drift_correction(drift, feedback))
    assert torch.equal(target, weight)
    grid = find_grid(weight, 3, 16)
    assert torch.equal(round_with_feedback(weight, grid, feedback, target=target), round_with_feedback(weight, grid, feedback))


def quantized_of(folder: Path) -> dict[str, QuantizedLinear]:
    """The quantized layers of a variant, by name."""
    return {name: layer for name, layer in network_of(folder).named_modules() if isinstance(layer, QuantizedLinear)}


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_blocks_are_compared_with_the_unchanged_model(make_model, tmp_path: Path, kind: str) -> None:
    """The first input of the first block has not drifted; those after it have."""
    folder, settings = make_model(kind), {"bits": 3, "group_size": 16}
    for drift in (0.0, 1.0):
        compress_to(folder, tmp_path / str(drift) / "variant", GPTQ(drift=drift, **settings))
    plain, fitted = (quantized_of(tmp_path / str(drift) / "variant") for drift in (0.0, 1.0))
    same = {name for name, layer in plain.items() if torch.equal(layer.integers(), fitted[name].integers())}
    first = ("query", "key", "value") if kind == "bert" else ("q_proj", "k_proj", "v_proj")
    assert same == {name for name in plain if ".0." in name and name.endswith(first)}
    with pytest.raises(UserError, match="leave `head` out, or `drift`"):
        parse_recipe({"steps": [{"method": "gptq", "drift": 1.0, "head": True}]})


def test_a_block_that_an_earlier_step_narrowed_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps\.1 \(gptq\): the input of .*output\.dense is \d+ wide, in the model that the step"):
        compress_to(bert, tmp_path / "variant", Width(channels=0.5), GPTQ(drift=0.5, group_size=16))
