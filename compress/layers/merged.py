"""One product for linear layers with the same input (query, key and value; gate and up), behind the layers' own names.

The layers' rows are put below each other in one layer, and a part stands in each layer's place. The first part that is called
with an input computes the whole product; the others take their columns of it. The product is kept in an attribute of the input
tensor. So it belongs to this one call of this one thread, and goes when the last part has taken its columns, or with the input.
Modules keep no state, and may be copied. A part that is called with another input computes anew, so a network may call its layers
in any order. It may not change an input in place between two parts; outside of inference mode such a change is found, and the
product computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compress.layers.float8_linear import Float8Linear
from compress.layers.kernels.choice import changes_of
from compress.layers.quantized_linear import QuantizedLinear

PRODUCTS = "_compress_products"
"""Attribute of an input tensor: the products that some parts have not taken yet, by merged layer."""


@dataclass
class _Product:
    value: torch.Tensor
    version: int | None
    taken: set[int] = field(default_factory=set)


class Merged(nn.Module):
    """Layers with the same input as one layer, whose outputs lie next to each other."""

    def __init__(self, layer: nn.Module, widths: Sequence[int]) -> None:
        """Take the merged layer, and the number of outputs of each part."""
        super().__init__()
        self.layer = layer
        self.widths = tuple(widths)
        self._traced: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., all outputs]."""
        y: torch.Tensor = self.layer(x)
        return y

    def columns(self, part: int) -> slice:
        """Return the columns of a part."""
        start = sum(self.widths[:part])
        return slice(start, start + self.widths[part])

    def part(self, x: torch.Tensor, part: int) -> torch.Tensor:
        """Return a part's outputs [..., widths[part]], a view of the whole product."""
        product = self._when_traced(x, part) if torch.compiler.is_compiling() else self._once(x, part)
        return product[..., self.columns(part)]

    def _once(self, x: torch.Tensor, part: int) -> torch.Tensor:
        waiting: dict[Merged, _Product] = x.__dict__.setdefault(PRODUCTS, {})
        version = changes_of(x)
        product = waiting.get(self)
        if product is None or product.version != version or part in product.taken:
            product = waiting[self] = _Product(self(x), version)
        product.taken.add(part)
        if len(product.taken) == len(self.widths):
            del waiting[self]
        return product.value

    def _when_traced(self, x: torch.Tensor, part: int) -> torch.Tensor:
        # torch.compile does not follow attributes of tensors. It runs this once, in one thread, and the graph has one product.
        product = self._traced[1] if self._traced is not None and self._traced[0] is x else self(x)
        self._traced = None if part == len(self.widths) - 1 else (x, product)
        return product


class Part(nn.Module):
    """Stands in the place of one of the layers."""

    def __init__(self, merged: Merged, part: int, in_features: int) -> None:
        super().__init__()
        self.merged = merged
        self.part = part
        self.in_features, self.out_features = in_features, merged.widths[part]

    @property
    def weight(self) -> torch.Tensor | None:
        """The layer's own rows of the weight, for networks that look at its dtype; None where it exists for a kernel only."""
        weight = getattr(self.merged.layer, "weight", None)
        return None if weight is None else weight[self.merged.columns(self.part)]

    @property
    def bias(self) -> torch.Tensor | None:
        """The layer's own bias."""
        bias = getattr(self.merged.layer, "bias", None)
        return None if bias is None else bias[self.merged.columns(self.part)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return self.merged.part(x, self.part)

    def extra_repr(self) -> str:
        """Show sizes in the printed model."""
        return f"in={self.in_features}, out={self.out_features}, part={self.part}"


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def can_merge(one: nn.Module, other: nn.Module) -> bool:
    """Whether one layer can hold the rows of both: the same kind, number format and input, which both round in the same way."""
    if type(one) is not type(other):
        return False
    if type(one) is nn.Linear:
        assert isinstance(other, nn.Linear)
        return (one.in_features, one.weight.dtype, one.weight.device) == (
            other.in_features,
            other.weight.dtype,
            other.weight.device,
        )
    if isinstance(one, QuantizedLinear) and isinstance(other, QuantizedLinear):
        alike = one.layer == other.layer and one.in_features == other.in_features
        unpacked = one.weight is not None and other.weight is not None
        return alike and unpacked and _same(one.input_scale, other.input_scale) and _same(one.input_factor, other.input_factor)
    if isinstance(one, Float8Linear) and isinstance(other, Float8Linear):
        return one.layer == other.layer and one.in_features == other.in_features
    return False


def _joined(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    return None if tensors[0] is None else torch.cat([tensor for tensor in tensors if tensor is not None])


def _biases(layers: Sequence[Any]) -> torch.Tensor | None:
    """Return the biases one after another, zeros where a layer has none; None where none has."""
    some: torch.Tensor | None = next((layer.bias for layer in layers if layer.bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers])


def _merged_float(layers: Sequence[nn.Linear]) -> nn.Module:
    weight, bias = torch.cat([layer.weight for layer in layers]), _biases(layers)
    with torch.device("meta"):
        merged = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    merged.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        merged.bias = nn.Parameter(bias, requires_grad=False)
    return merged


def _merged_integers(layers: Sequence[QuantizedLinear]) -> nn.Module:
    first = layers[0]
    weight = torch.cat([layer._stored() for layer in layers])  # rows are packed one by one
    scale = torch.cat([layer.weight_scale for layer in layers])
    zero = _joined([layer.weight_zero for layer in layers])
    return QuantizedLinear(
        first.layer, first.in_features, weight, scale, _biases(layers),
        zero=zero, input_scale=first.input_scale, input_factor=first.input_factor,
    )  # fmt: skip


def _merged_float8(layers: Sequence[Float8Linear]) -> nn.Module:
    # Bytes are joined: not every device concatenates FP8 tensors.
    weight = torch.cat([layer.weight.view(torch.uint8) for layer in layers]).view(layers[0].weight.dtype)
    return Float8Linear(layers[0].layer, weight, torch.cat([layer.weight_scale for layer in layers]), _biases(layers))


_MERGE: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Linear: _merged_float,
    QuantizedLinear: _merged_integers,
    Float8Linear: _merged_float8,
}


@torch.no_grad()
def merge(layers: Sequence[nn.Module]) -> list[Part]:
    """Return parts that stand in for linear layers with the same input.

    Raises:
        ValueError: `can_merge` is false for two of the layers, or there are fewer than two.
    """
    if len(layers) < 2 or not all(can_merge(layers[0], layer) for layer in layers[1:]):
        raise ValueError(f"these layers do not merge: {[type(layer).__name__ for layer in layers]}")
    merged = Merged(_MERGE[type(layers[0])](layers), [int(layer.out_features) for layer in layers])  # type: ignore[arg-type]
    return [Part(merged, part, int(layer.in_features)) for part, layer in enumerate(layers)]  # type: ignore[arg-type]
