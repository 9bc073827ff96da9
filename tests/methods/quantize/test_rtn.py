"""Round to nearest on whole networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tests_support import apply_in_memory, compress_to, folder_of, network_of

from compress.layers.quantized_linear import QuantizedLinear, round_groups
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.models.network.build import load_network


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_every_linear_layer_of_the_blocks_and_nothing_else(make_model, kind: str) -> None:
    folder = make_model(kind)
    network = load_network(folder_of(folder), torch.float32)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    quantized = apply_in_memory(network, RTN())
    assert set(quantized) == set(folder_of(folder).shape.block_linears)
    for name, module in network.named_modules():
        assert isinstance(module, QuantizedLinear) == (name in quantized)
    for name, tensor in network.state_dict().items():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(tensor, before[name])


def test_weights_are_the_nearest_integers(bert: Path) -> None:
    network = load_network(folder_of(bert), torch.float32)
    name = "encoder.layer.0.attention.self.query"
    weight = network.get_submodule(name).weight.detach().clone()
    apply_in_memory(network, RTN())
    layer = network.get_submodule(name)
    assert (layer.weight.abs().amax(dim=1) == 127).all()
    error = (layer.weight.float() * layer.weight_scale[:, None] - weight).abs()
    assert (error <= layer.weight_scale[:, None] * 0.5001).all()


def test_skip_leaves_layers_alone(bert: Path) -> None:
    network = load_network(folder_of(bert), torch.float32)
    quantized = apply_in_memory(network, RTN(skip=("*.intermediate.dense", "encoder.layer.1.*")))
    assert set(quantized) == {f"encoder.layer.0.{part}" for part in (
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "output.dense"
    )}  # fmt: skip
    with pytest.raises(ValueError, match=r"'\*\.nosuch' matches none"):
        RTN(skip=("*.nosuch",)).estimate(folder_of(bert).shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bert: Path, bad: float) -> None:
    network = load_network(folder_of(bert), torch.float32)
    network.get_submodule("encoder.layer.1.output.dense").weight.data[3, 5] = bad
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight holds NaN"):
        apply_in_memory(network, RTN())


def test_zero_and_constant_channels() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"dense": torch.nn.Linear(4, 3, bias=False)})])

    block = Block()
    weight = torch.tensor([[0.0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.1, 0, -1.0, 0]])
    block.layers[0]["dense"].weight.data = weight
    assert set(RTN().apply({"layers.0": block.layers[0]})) == {"layers.0.dense"}
    layer = block.layers[0]["dense"]
    assert layer.weight.tolist() == [[0, 0, 0, 0], [127] * 4, [13, 0, -127, 0]]
    assert torch.isfinite(layer(torch.eye(4))).all()


@pytest.mark.parametrize(
    "settings",
    [{"group_size": None}, {"group_size": 16, "overrides": {"*.output.dense": {"group_size": None}}}],
    ids=["step", "override"],
)
@pytest.mark.parametrize("method", [RTN, GPTQ])
def test_activations_by_group_are_scaled_in_the_groups_of_the_weight(method: type[RTN] | type[GPTQ], settings: dict) -> None:
    with pytest.raises(ValidationError, match="`activations: dynamic_per_group` needs a `group_size`"):
        method(bits=4, activations="dynamic_per_group", **settings)


@pytest.mark.parametrize("step", [RTN(bits=4, group_size=16, activations="dynamic_per_group"), GPTQ(group_size=16, activations="dynamic_per_group")],
                         ids=["rtn", "gptq"])  # fmt: skip
def test_activations_by_group_are_stored_and_loaded(bert: Path, tmp_path: Path, step: RTN | GPTQ) -> None:
    compress_to(bert, tmp_path / "variant", step)
    info = folder_of(tmp_path / "variant").compressed
    assert {(layer.name, layer.activations) for layer in info.quantized.values()} == {("int4-g16", "dynamic_per_group")}
    assert step.estimate(folder_of(bert).shape).quantized == info.quantized
    layer = network_of(tmp_path / "variant").get_submodule("encoder.layer.0.output.dense")
    x = torch.randn(3, layer.in_features)
    assert (layer(x) - layer.plain()(x)).abs().max() > 1e-4  # its input is rounded
    torch.testing.assert_close(layer(x), layer.plain()(round_groups(x, 16)), rtol=1e-5, atol=1e-5)
