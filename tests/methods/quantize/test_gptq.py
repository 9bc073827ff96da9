"""GPTQ against the published algorithm, against plain rounding, and on inputs that have nothing to say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import compress_to, folder_of

from compress.common.errors import UserError
from compress.layers.float4 import AnyGrid, find_float4_grid
from compress.layers.grid import Grid, find_grid
from compress.layers.scheme import FLOAT4_GROUPS, Numbers
from compress.methods.error_feedback import factor
from compress.methods.quantize.gptq import GPTQ, round_with_feedback
from compress.models.files.variant import VariantInfo

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def problem(outputs: int, inputs: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs whose channels hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    rows = torch.randn(tokens, inputs, generator=generator) @ (mixing + torch.eye(inputs))
    return torch.randn(outputs, inputs, generator=generator), rows


def loss(weight: torch.Tensor, grid: AnyGrid, integers: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Squared error of each output on the calibration rows."""
    return (rows @ (weight - grid.values(integers)).t()).square().sum(dim=0)


def published(weight: torch.Tensor, moment: torch.Tensor, grid: AnyGrid, damping: float, act_order: bool) -> torch.Tensor:
    """Algorithm 1 of arXiv 2210.17323 in float64, word for word: the inverse, its Cholesky factor, column after column."""
    h = moment.double().clone()
    h.diagonal().add_(damping * moment.diagonal().mean())
    order = moment.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(len(h))
    w, h = weight.double()[:, order].clone(), h[order][:, order]
    inverse = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    group = grid.group_of(weight.shape[1])[order]
    integers = torch.empty(weight.shape, dtype=torch.uint8)
    for i in range(len(h)):
        scale, zero = grid.scale[:, group[i]].double(), grid.zero[:, group[i]].double()
        if isinstance(grid, Grid):
            steps = ((w[:, i] / scale).round() + zero).clamp(grid.lowest, grid.highest)
            integers[:, i] = steps.to(torch.uint8)
            value = (steps - zero) * scale
        else:
            nearest = (w[:, i, None] / scale[:, None] - E2M1).abs().argmin(dim=1)
            integers[:, i] = nearest.to(torch.uint8)
            value = E2M1[nearest] * scale
        error = (w[:, i] - value) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
    back = torch.empty_like(integers)
    back[:, order] = integers
    return back


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, True), (4, 32, False), (3, None, True), (8, None, True)])
def test_it_is_the_published_algorithm(act_order: bool, bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, rows = problem(40, 160, 600)  # more than one block of channels
    moment = rows.t() @ rows / len(rows)
    grid = find_grid(weight, bits, group_size, symmetric)
    ours = round_with_feedback(weight, grid, factor(moment, 0.01, act_order))
    theirs = published(weight, moment, grid, 0.01, act_order)
    better = loss(weight, grid, theirs, rows) < loss(weight, grid, grid.round(weight), rows)
    assert better.sum() > 30
    # Where a weight lies between two integers float32 and float64 may part, and then what follows does; seldom.
    assert (ours == theirs)[better].float().mean() > 0.995


@pytest.mark.parametrize("numbers", list(FLOAT4_GROUPS))
def test_four_bit_floats_are_rounded_by_the_same_algorithm(numbers: Numbers) -> None:
    weight, rows = problem(40, 160, 600)
    moment = rows.t() @ rows / len(rows)
    grid = find_float4_grid(weight, numbers)
    ours, theirs = round_with_feedback(weight, grid, factor(moment, 0.01, True)), published(weight, moment, grid, 0.01, True)
    better = loss(weight, grid, theirs, rows) < loss(weight, grid, grid.round(weight), rows)
    assert better.sum() > 30
    same = grid.values(ours) == grid.values(theirs)  # the sign of a zero is no matter
    assert same[better].float().mean() > 0.995
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    pruned = weight.masked_fill(gone, 0)
    kept = grid.values(round_with_feedback(pruned, grid, factor(moment, 0.01, True), gone))
    assert (kept[gone] == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 16, 24])
@pytest.mark.parametrize("tokens", [1, 5, 400])
@pytest.mark.parametrize("inputs", [64, 77])
def test_no_output_is_worse_off_than_with_plain_rounding(bits: int, group_size: int | None, tokens: int, inputs: int) -> None:
    weight, rows = problem(30, inputs, tokens, seed=tokens)
    rows[:, 3] = 0  # a channel that no text uses
    rows[:, 7] = 2.5  # one that is always the same
    weight[4] = 0
    grid = find_grid(weight, bits, group_size)
    feedback = factor(rows.t() @ rows / tokens, 0.01, act_order=True)
    fed, plain = (
        loss(weight, grid, integers, rows) for integers in (round_with_feedback(weight, grid, feedback), grid.round(weight))
    )
    assert (fed <= plain * (1 + 1e-3) + 1e-6).all()
    if tokens > inputs:
        assert fed.sum() < 0.7 * plain.sum()


def test_inputs_that_are_all_zero_are_rounded_plainly() -> None:
    weight = problem(8, 32, 1)[0]
    grid = find_grid(weight, 4, 16)
    assert torch.equal(round_with_feedback(weight, grid, factor(torch.zeros(32, 32), 0.01, True)), grid.round(weight))


def test_a_moment_without_a_factor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not positive definite with a damping of 0\.01; raise `damping`"):
        factor(-torch.eye(4), 0.01, True)


def test_rows_beyond_one_stretch_are_rounded_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.methods.quantize import gptq

    weight, rows = problem(50, 96, 300)
    grid, feedback = find_grid(weight, 4, 32), factor(rows.t() @ rows / 300, 0.01, True)
    whole = round_with_feedback(weight, grid, feedback)
    monkeypatch.setattr(gptq, "ROWS", 16)
    assert (round_with_feedback(weight, grid, feedback) == whole).float().mean() > 0.999


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bert: Path, copy_of, tmp_path: Path, bad: float) -> None:
    folder = copy_of(bert)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 5] = bad
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"steps\.0 \(gptq\): encoder\.layer\.1\.output\.dense\.weight holds NaN or infinity"):
        compress_to(folder, tmp_path / "variant", GPTQ(group_size=16))


def test_the_estimate_counts_every_byte(bert: Path, tmp_path: Path) -> None:
    step = GPTQ(bits=4, group_size=16, symmetric=False, overrides={"*.output.dense": {"bits": 8, "group_size": None}})
    compress_to(bert, tmp_path / "variant", step)
    info = VariantInfo.read(tmp_path / "variant")
    assert info.weights == "int4-g16+int8"
    planned, stored = step.estimate(folder_of(bert).shape).after.tensors, folder_of(tmp_path / "variant").headers
    for name in (name for name in planned if name.rpartition(".")[0] in info.quantized):
        assert (stored[name].dtype, stored[name].shape) == (planned[name].dtype, planned[name].shape), name


def test_calibration_runs_the_network_as_it_embeds(make_model, tmp_path: Path) -> None:
    """Without dropout, which a network made anew has at work: two runs give the same file."""
    folder = make_model("bert")
    assert json.loads((folder / "config.json").read_text())["hidden_dropout_prob"] > 0
    for name in ("one", "two"):
        compress_to(folder, tmp_path / name / "variant", GPTQ(group_size=16))
    one, two = (load_file(tmp_path / name / "variant" / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
