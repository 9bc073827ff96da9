"""SparseGPT against the published algorithm."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import compress_to, folder_of

from compress.methods.error_feedback import factor
from compress.methods.prune.base import lowest_in_groups
from compress.methods.prune.sparsegpt import SparseGPT, prune_with_feedback
from compress.methods.quantize.gptq import GPTQ, round_with_feedback
from compress.models.architectures import is_block_linear
from compress.models.opened import empty_model, weights_of


def linears(folder: Path) -> dict[str, torch.Tensor]:
    """The linear layers of a variant's blocks, dense."""
    network = empty_model(folder_of(folder))
    weights_of(folder_of(folder), network).fill(network)
    return {name: tensor for name, tensor in network.state_dict().items() if is_block_linear(name, tensor.dim())}


def correlated(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 256] and the second moment of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2000, 32, generator=generator) @ torch.randn(32, 256, generator=generator)
    inputs += 0.5 * torch.randn(2000, 256, generator=generator) * torch.rand(256, generator=generator)
    return torch.randn(24, 256, generator=generator), inputs.t() @ inputs / 2000


def loss(weight: torch.Tensor, made: torch.Tensor, moment: torch.Tensor) -> float:
    error = (weight - made).double()
    return float((error @ moment.double() * error).sum())


def published(weight: torch.Tensor, moment: torch.Tensor, damping: float, group: tuple[int, int] | None) -> torch.Tensor:
    """Frantar and Alistarh 2023, algorithm 1, in float64: with the inverse, column by column."""
    weight, moment = weight.double().clone(), moment.double()
    moment = moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(moment), upper=True)
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    block = 128
    for column in range(weight.shape[1]):
        if group is None and column % block == 0:
            scores = weight[:, column : column + block].square() / inverse.diagonal()[column : column + block].square()
            gone[:, column : column + block] = scores <= scores.flatten().kthvalue(scores.numel() // 2).values
        if group and column % group[1] == 0:
            near = slice(column, column + group[1])
            gone[:, near] = lowest_in_groups(weight[:, near].square() / inverse.diagonal()[near].square(), group)
        error = torch.where(gone[:, column], weight[:, column] / inverse[column, column], 0.0)
        weight[:, column:] -= error[:, None] * inverse[column, column:]
        weight[gone[:, column], column] = 0
    return weight


@pytest.mark.parametrize("group", [None, (2, 4), (4, 8)])
def test_sparsegpt_is_the_published_algorithm(group: tuple[int, int] | None) -> None:
    weight, moment = correlated()
    ours = prune_with_feedback(weight, factor(moment, 0.01, act_order=False), 0.5, group)
    theirs = published(weight, moment, 0.01, group)
    assert ((ours == 0) == (theirs == 0)).float().mean() > 0.999
    assert loss(weight, ours, moment) == pytest.approx(loss(weight, theirs.float(), moment), rel=2e-2)


def test_each_method_loses_less_than_the_one_before() -> None:
    weight, moment = correlated()
    feedback = factor(moment, 0.01, act_order=False)
    for group in ((2, 4), (4, 8)):
        by_size = weight.masked_fill(lowest_in_groups(weight.abs(), group), 0)
        by_input = weight.masked_fill(lowest_in_groups(weight.abs() * moment.diagonal().sqrt(), group), 0)
        refitted = prune_with_feedback(weight, feedback, 0.5, group)
        losses = [loss(weight, made, moment) for made in (by_size, by_input, refitted)]
        assert losses[0] > losses[1] > 2 * losses[2]


def test_gptq_after_pruning_keeps_the_zeros_and_rounds_for_the_others(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant", SparseGPT(pattern="2:4"), GPTQ(bits=8, group_size=None))
    for name, weight in linears(tmp_path / "variant").items():
        if name.endswith(".weight"):
            assert ((weight == 0).view(-1, 4).sum(dim=1) >= 2).all(), name
    assert any(name.endswith("_mask") for name in folder_of(tmp_path / "variant").headers)
    from compress.layers.grid import find_grid

    weight, moment = correlated()
    sparse = prune_with_feedback(weight, factor(moment, 0.01, act_order=False), 0.5, (2, 4))
    grid, feedback = find_grid(sparse, 3), factor(moment, 0.01, act_order=True)
    fed = grid.values(round_with_feedback(sparse, grid, feedback, sparse == 0))
    assert (fed[sparse == 0] == 0).all()
    assert loss(sparse, fed, moment) < 0.9 * loss(sparse, grid.values(grid.round(sparse)), moment)
