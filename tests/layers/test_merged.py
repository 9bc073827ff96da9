"""Merged products give what the separate layers give, in every number format, once for an input and for no other."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from compress.layers.compressed import CompressedLayer
from compress.layers.float8_linear import Float8Linear
from compress.layers.grid import find_grid
from compress.layers.merged import PRODUCTS, Merged, Part, can_merge, merge
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme
from compress.runtimes.merging import merge_products, sibling_names
from compress.runtimes.torch_runtime import prepare

CPU = torch.device("cpu")
NONE, STATIC, TOKEN = ActivationScheme.NONE, ActivationScheme.STATIC_PER_TENSOR, ActivationScheme.DYNAMIC_PER_TOKEN


def _static(linear: nn.Linear, factor: bool = False) -> QuantizedLinear:
    grid = find_grid(linear.weight.detach(), 8)
    scale, divisor = torch.tensor(0.05), torch.rand(linear.in_features, generator=torch.Generator().manual_seed(0)) + 0.5
    integers = grid.round(linear.weight.detach())
    return QuantizedLinear.from_integers(
        integers, grid, linear.bias, STATIC, input_scale=scale, input_factor=divisor if factor else None
    )


FORMATS = {
    "float": lambda linear: linear,
    "int8 per token": lambda linear: QuantizedLinear.from_float(linear, TOKEN),
    "int8 per tensor": lambda linear: QuantizedLinear.from_float(linear, ActivationScheme.DYNAMIC_PER_TENSOR),
    "int8 static": _static,
    "int8 static, divided": lambda linear: _static(linear, factor=True),
    "int8 weights": lambda linear: QuantizedLinear.from_float(linear, NONE),
    "int4 weights": lambda linear: QuantizedLinear.from_float(linear, NONE, 4, group_size=16, symmetric=False),
    "int3 weights": lambda linear: QuantizedLinear.from_float(linear, NONE, 3),
    "fp8": lambda linear: Float8Linear.from_float(linear, TOKEN),
    "fp8 weights": lambda linear: Float8Linear.from_float(linear, NONE),
}


def layers(kind: str, biases: tuple[bool, ...] = (True, True, True)) -> list[nn.Module]:
    torch.manual_seed(0)
    linears = [nn.Linear(37, width, bias=bias).requires_grad_(False) for width, bias in zip((24, 8, 16), biases, strict=True)]
    return [FORMATS[kind](linear) for linear in linears]


def counted(part: Part) -> list[int]:
    """Count the products of a merged layer from now on."""
    calls: list[int] = []
    part.merged.layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
@pytest.mark.parametrize("packed", [False, True])
def test_merged_equals_separate(kind: str, biases: tuple[bool, ...], packed: bool) -> None:
    x, separate = torch.randn(2, 5, 37), layers(kind, biases)
    expected = [layer(x) for layer in separate]
    parts = merge(separate)
    if packed and isinstance(parts[0].merged.layer, CompressedLayer):
        parts[0].merged.layer.pack()
    calls = counted(parts[0])
    with torch.inference_mode():
        found = [part(x) for part in parts]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert one.shape == other.shape
    assert len(calls) == 1
    assert not getattr(x, PRODUCTS)  # nothing stays with the input


def test_layers_that_differ_do_not_merge() -> None:
    plain, quantized = layers("float"), layers("int8 per token")
    assert can_merge(plain[0], plain[1])
    assert not can_merge(plain[0], quantized[0])
    assert not can_merge(quantized[0], layers("int8 weights")[0])
    assert not can_merge(plain[0], nn.Linear(36, 8))
    assert not can_merge(plain[0], plain[1].half())
    assert not can_merge(layers("fp8")[0], layers("fp8 weights")[0])
    one, other = layers("int8 static")[:2]
    assert can_merge(one, other)
    other.input_scale = torch.tensor(0.06)
    assert not can_merge(one, other)
    one.pack()
    assert not can_merge(one, layers("int8 static")[0])
    with pytest.raises(ValueError, match="do not merge"):
        merge([plain[0], quantized[0]])
    with pytest.raises(ValueError, match="do not merge"):
        merge(plain[:1])


def test_each_input_has_its_own_product() -> None:
    separate = layers("float")
    query, key, value = merge(separate)
    first, second = torch.randn(3, 37), torch.randn(3, 37)
    with torch.inference_mode():
        mixed = [query(first), key(second), value(first), key(first), query(first)]
    order = [(0, first), (1, second), (2, first), (1, first), (0, first)]
    for found, (layer, x) in zip(mixed, order, strict=True):
        torch.testing.assert_close(found, separate[layer](x))


def test_an_input_that_changed_in_between_is_multiplied_anew() -> None:
    separate = layers("float")
    query, key, _ = merge(separate)
    x = torch.randn(3, 37)
    query(x)
    x.mul_(2)
    torch.testing.assert_close(key(x), separate[1](x))


def test_copies_are_whole_and_apart() -> None:
    holder = nn.ModuleDict(dict(zip(("q_proj", "k_proj", "v_proj"), merge(layers("int8 per token")), strict=True)))
    x = torch.randn(4, 37)
    before = holder["q_proj"](x)
    twin = copy.deepcopy(holder)
    assert len({part.merged for part in twin.values()}) == 1
    assert twin["q_proj"].merged is not holder["q_proj"].merged
    twin["q_proj"].merged.layer.weight.zero_()
    twin["q_proj"].merged.layer.bias.zero_()
    assert not twin["k_proj"](x).any()
    assert torch.equal(holder["q_proj"](x), before)
    assert torch.equal(copy.deepcopy(holder["k_proj"])(x), holder["k_proj"](x))


def test_threads_do_not_mix_their_inputs() -> None:
    separate = layers("float")
    parts = merge(separate)
    wrong: list[int] = []
    barrier = threading.Barrier(4)

    def work(number: int) -> None:
        x = torch.full((2, 37), float(number))
        for _ in range(50):
            barrier.wait()
            with torch.inference_mode():
                found = [part(x) for part in parts]
            wrong.extend(number for one, layer in zip(found, separate, strict=True) if not torch.allclose(one, layer(x), atol=1e-4))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_compiled_network_has_one_product() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = layers("float")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            return torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), dim=-1)

    attention = Attention()
    x, other = torch.randn(3, 37), torch.randn(3, 37)
    expected = attention(x), attention(other)
    assert merge_products(attention) == 1
    products: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        products.append(sum("linear" in str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
        return graph.forward

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close((compiled(x), compiled(other)), expected)
    assert products == [1]


def tiny(kind: str, **more: object) -> nn.Module:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **sizes, **more, pad_token_id=0)).eval().requires_grad_(False)


@pytest.mark.parametrize(("kind", "count"), [("bert", 2), ("mistral", 4), ("mpnet", 2)])
def test_a_network_is_merged_where_it_is_asked_for(kind: str, count: int) -> None:
    more = {"num_key_value_heads": 2} if kind == "mistral" else {}
    network, twin = (tiny(kind, **more) for _ in range(2))
    ids = torch.randint(1, 50, (2, 9))
    prepare(twin, torch.float32, CPU)
    assert not any(isinstance(module, Part) for module in twin.modules())  # a CPU's numbers stay as they are
    prepare(network, torch.float32, CPU, merged=True)
    assert sum(isinstance(module, Merged) for module in network.modules()) == count
    with torch.inference_mode():
        found, expected = (one(input_ids=ids).last_hidden_state for one in (network, twin))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_attention_that_projects_positions_stays() -> None:
    settings = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True, "position_buckets": 4}
    assert merge_products(tiny("deberta-v2", **settings)) == 0


def test_a_layer_in_another_format_stays_alone() -> None:
    holder = nn.ModuleDict(dict(zip(("q_proj", "k_proj", "v_proj"), layers("float"), strict=True)))
    holder["v_proj"] = layers("int8 weights")[2]
    x = torch.randn(3, 37)
    expected = {name: layer(x) for name, layer in holder.items()}
    assert merge_products(holder) == 1
    assert [isinstance(layer, Part) for layer in holder.values()] == [True, True, False]
    for name, layer in holder.items():
        torch.testing.assert_close(layer(x), expected[name])
    assert ("gate_proj", "up_proj") in sibling_names()
