"""Pruning: exact patterns, files that shrink and open as what was pruned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import apply_in_memory, compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.methods.base import Method
from compress.methods.prune.base import GROUPS
from compress.methods.prune.magnitude import Magnitude
from compress.methods.prune.sparsegpt import SparseGPT
from compress.methods.prune.wanda import Wanda
from compress.methods.quantize.rtn import RTN
from compress.models.architectures import is_block_linear
from compress.models.network.build import load_network
from compress.models.opened import empty_model, weights_of
from compress.runtimes.lower import lower

TEXTS = ["the parcel never came", "rain by the evening", "who wrote it", "x", ""]


METHODS: list[type[Magnitude] | type[Wanda] | type[SparseGPT]] = [Magnitude, Wanda, SparseGPT]


def linears(folder: Path) -> dict[str, torch.Tensor]:
    """The linear layers of a variant's blocks, dense."""
    network = empty_model(folder_of(folder))
    weights_of(folder_of(folder), network).fill(network)
    return {name: tensor for name, tensor in network.state_dict().items() if is_block_linear(name, tensor.dim())}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_exactly_as_many_go_as_the_pattern_says(bert: Path, tmp_path: Path, kind: type[Magnitude], pattern: str) -> None:
    step = kind(pattern=pattern)
    compress_to(bert, tmp_path / "variant", step)
    dense = {
        f"{name}.weight": module.weight
        for name, module in load_network(folder_of(bert), torch.float16).named_modules()
        if hasattr(module, "weight")
    }
    for name, weight in linears(tmp_path / "variant").items():
        zeros = weight == 0
        if pattern == "unstructured":
            assert float(zeros.float().mean()) == pytest.approx(0.5, abs=1e-3)
        else:
            goes, of = GROUPS[pattern]
            assert (zeros.view(-1, of).sum(dim=1) == goes).all()
        if kind is not SparseGPT:
            assert torch.equal(weight[~zeros], dense[name][~zeros])
    estimated = step.estimate(folder_of(bert).shape).after
    stored = sum(info.bytes for info in folder_of(tmp_path / "variant").headers.values())
    assert stored == pytest.approx(estimated.bytes, rel=1e-3)
    assert stored < 0.85 * folder_of(bert).shape.half_bytes


@pytest.mark.parametrize("kind", METHODS)
def test_sparsities_go_by_layer(bert: Path, tmp_path: Path, kind: type[Magnitude]) -> None:
    step = kind(sparsity=0.25, overrides={"*.value": {"sparsity": 0.75}, "*.layer.1.intermediate.*": {"pattern": "2:4"}})
    compress_to(bert, tmp_path / "variant", step)
    for name, weight in linears(tmp_path / "variant").items():
        share = float((weight == 0).float().mean())
        if "layer.1.intermediate" in name:
            assert ((weight == 0).view(-1, 4).sum(dim=1) == 2).all()
        else:
            assert share == pytest.approx(0.75 if name.endswith("value.weight") else 0.25, abs=0.01), name
    estimated = step.estimate(folder_of(bert).shape)
    stored = sum(info.bytes for info in folder_of(tmp_path / "variant").headers.values())
    assert stored == pytest.approx(estimated.after.bytes, rel=5e-3)
    assert "25 % or 2:4 of them or 75 % set to zero" in estimated.note
    assert folder_of(tmp_path / "variant").compressed.weights == "float16 25%/75% zeros 2:4"
    with pytest.raises(ValueError, match="takes half of the weights"):
        kind(overrides={"*.value": {"pattern": "2:4"}, "*.layer.0.*": {"sparsity": 0.3}}).estimate(folder_of(bert).shape)


@pytest.mark.parametrize(
    "steps", [(Magnitude(),), (Magnitude(), RTN()), (Magnitude(pattern="2:4"), RTN(bits=4, activations="none", group_size=16))]
)
def test_opened_from_its_file_it_is_what_was_pruned(bert: Path, tmp_path: Path, steps: tuple[Method, ...]) -> None:
    compress_to(bert, tmp_path / "variant", *steps)
    network = load_network(folder_of(bert), torch.float32)
    apply_in_memory(network, *steps)
    expected = {name: tensor for name, tensor in network.state_dict().items() if is_block_linear(name, tensor.dim())}
    for name, weight in linears(tmp_path / "variant").items():
        assert torch.equal(weight, expected[name].to(weight.dtype))
    whole = compress.load(str(tmp_path / "variant"), device="cpu").encode(TEXTS)
    streamed = compress.load(str(tmp_path / "variant"), device="cpu", stream=True).encode(TEXTS)
    np.testing.assert_array_equal(whole, streamed)


def test_refusals(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes half of the weights"):
        Wanda(pattern="2:4", sparsity=0.6)
    with pytest.raises(ValueError, match="greater than 0"):
        Wanda(sparsity=0.0)
    with pytest.raises(ValueError, match="matches none of the model's 12 linear layers"):
        Magnitude(skip=("*.nothing",)).estimate(folder_of(bert).shape)
    compress_to(bert, tmp_path / "variant", Magnitude())
    with pytest.raises(UserError, match="is stored without its zeros, which openvino cannot refer to"):
        lower(folder_of(tmp_path / "variant"), "openvino")
    tensors = load_file(tmp_path / "variant" / "model.safetensors")
    name = next(name for name in tensors if name.endswith("_mask"))
    tensors[name] = tensors[name].bitwise_xor(1)
    save_file(tensors, tmp_path / "variant" / "model.safetensors")
    with pytest.raises(UserError, match=r"values, \d+ are stored"):
        compress.load(str(tmp_path / "variant"), device="cpu")


def test_for_a_graph_runtime_the_weights_stay_dense(bert: Path, tmp_path: Path) -> None:
    from compress.common.journal import Journal
    from compress.models.source import find
    from compress.pipeline.apply import make_variant
    from compress.pipeline.stage import BuildOptions

    journal = Journal(tmp_path / "journal")
    shape = folder_of(bert).shape
    options = BuildOptions("0", lambda _: None, runtime="onnxruntime")
    make_variant(find(str(bert)), shape, (Magnitude(),), tmp_path / "variant", journal, options)
    lower(folder_of(tmp_path / "variant"), "onnxruntime")
    ours = compress.load(str(tmp_path / "variant")).encode(TEXTS)
    theirs = compress.load(str(tmp_path / "variant"), runtime="torch", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
