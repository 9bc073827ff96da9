"""Pruning: exact patterns, what is left where it was or refitted, files that shrink and open as what was pruned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import apply_in_memory, compress_to

import compress
from compress.common.errors import UserError
from compress.layers.bitmask import decode, encode
from compress.methods.base import Method
from compress.methods.error_feedback import factor
from compress.methods.prune.base import lowest_in_groups
from compress.methods.prune.magnitude import Magnitude
from compress.methods.prune.sparsegpt import SparseGPT, prune_with_feedback
from compress.methods.prune.wanda import Wanda
from compress.methods.quantize.gptq import GPTQ, round_with_feedback
from compress.methods.quantize.rtn import RTN
from compress.models.architectures import is_block_linear
from compress.models.files.headers import read_headers
from compress.models.network.build import load_network
from compress.models.opened import empty_model, weights_of
from compress.models.shape import read_shape
from compress.runtimes.lower import lower

TEXTS = ["the parcel never came", "rain by the evening", "who wrote it", "x", ""]
METHODS: list[type[Magnitude] | type[Wanda] | type[SparseGPT]] = [Magnitude, Wanda, SparseGPT]


def linears(folder: Path) -> dict[str, torch.Tensor]:
    """The linear layers of a variant's blocks, dense."""
    network = empty_model(folder)
    weights_of(folder, network).fill(network)
    return {name: tensor for name, tensor in network.state_dict().items() if is_block_linear(name, tensor.dim())}


@pytest.mark.parametrize("width", [1, 7, 8, 48, 51])
def test_a_matrix_taken_apart_is_put_together_again(width: int) -> None:
    matrix = torch.randn(5, width).half() * (torch.rand(5, width) > 0.5)
    bits, values = encode(matrix)
    assert bits.shape == (5, -(-width // 8))
    assert len(values) == int((matrix != 0).sum())
    assert torch.equal(decode(bits, values, width), matrix)
    with pytest.raises(ValueError, match="values are to be placed"):
        decode(bits, torch.cat((values, values.new_ones(1))), width)
    assert encode(torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0, 7]]))[0].tolist() == [[2, 1]]  # the first value is the lowest bit


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_exactly_as_many_go_as_the_pattern_says(bert: Path, tmp_path: Path, kind: type[Magnitude], pattern: str) -> None:
    step = kind(pattern=pattern)
    compress_to(bert, tmp_path / "variant", step)
    dense = {
        f"{name}.weight": module.weight
        for name, module in load_network(bert, torch.float16).named_modules()
        if hasattr(module, "weight")
    }
    for name, weight in linears(tmp_path / "variant").items():
        zeros = weight == 0
        if pattern == "unstructured":
            assert float(zeros.float().mean()) == pytest.approx(0.5, abs=1e-3)
        else:
            goes, of = step.group
            assert (zeros.view(-1, of).sum(dim=1) == goes).all()
        if kind is not SparseGPT:
            assert torch.equal(weight[~zeros], dense[name][~zeros])
    estimated = step.estimate(read_shape("tiny", bert)).after
    stored = sum(info.bytes for info in read_headers(tmp_path / "variant").values())
    assert stored == pytest.approx(estimated.bytes, rel=1e-3)
    assert stored < 0.85 * read_shape("tiny", bert).half_bytes


@pytest.mark.parametrize(
    "steps", [(Magnitude(),), (Magnitude(), RTN()), (Magnitude(pattern="2:4"), RTN(bits=4, activations="none", group_size=16))]
)
def test_opened_from_its_file_it_is_what_was_pruned(bert: Path, tmp_path: Path, steps: tuple[Method, ...]) -> None:
    compress_to(bert, tmp_path / "variant", *steps)
    network = load_network(bert, torch.float32)
    apply_in_memory(network, *steps)
    expected = {name: tensor for name, tensor in network.state_dict().items() if is_block_linear(name, tensor.dim())}
    for name, weight in linears(tmp_path / "variant").items():
        assert torch.equal(weight, expected[name].to(weight.dtype))
    whole = compress.load(str(tmp_path / "variant"), device="cpu").encode(TEXTS)
    streamed = compress.load(str(tmp_path / "variant"), device="cpu", stream=True).encode(TEXTS)
    np.testing.assert_array_equal(whole, streamed)


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
    assert any(name.endswith("_mask") for name in read_headers(tmp_path / "variant"))
    from compress.layers.grid import find_grid

    weight, moment = correlated()
    sparse = prune_with_feedback(weight, factor(moment, 0.01, act_order=False), 0.5, (2, 4))
    grid, feedback = find_grid(sparse, 3), factor(moment, 0.01, act_order=True)
    fed = grid.values(round_with_feedback(sparse, grid, feedback, sparse == 0))
    assert (fed[sparse == 0] == 0).all()
    assert loss(sparse, fed, moment) < 0.9 * loss(sparse, grid.values(grid.round(sparse)), moment)


def test_refusals(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes half of the weights"):
        Wanda(pattern="2:4", sparsity=0.6)
    with pytest.raises(ValueError, match="greater than 0"):
        Wanda(sparsity=0.0)
    with pytest.raises(ValueError, match="matches none of the model's 12 linear layers"):
        Magnitude(skip=("*.nothing",)).estimate(read_shape("tiny", bert))
    compress_to(bert, tmp_path / "variant", Magnitude())
    with pytest.raises(UserError, match="is stored as its values that are not zero, which openvino cannot refer to"):
        lower(tmp_path / "variant", "openvino")
    tensors = load_file(tmp_path / "variant" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_mask"))
    tensors[name] = tensors[name].bitwise_xor(1)
    save_file(tensors, tmp_path / "variant" / "model.safetensors")
    with pytest.raises(UserError, match="values are to be placed"):
        compress.load(str(tmp_path / "variant"), device="cpu")


def test_for_a_graph_runtime_the_weights_stay_dense(bert: Path, tmp_path: Path) -> None:
    from compress.common.journal import Journal
    from compress.models.source import find
    from compress.pipeline.apply import make_variant
    from compress.pipeline.stage import BuildOptions

    journal = Journal(tmp_path / "journal")
    shape = read_shape("tiny", bert)
    options = BuildOptions("0", lambda _: None, runtime="onnxruntime")
    make_variant(find(str(bert)), shape, (Magnitude(),), tmp_path / "variant", journal, options)
    lower(tmp_path / "variant", "onnxruntime")
    ours = compress.load(str(tmp_path / "variant")).encode(TEXTS)
    theirs = compress.load(str(tmp_path / "variant"), runtime="torch", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
