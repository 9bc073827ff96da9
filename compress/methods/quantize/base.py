"""What the methods that quantize linear layers share: which layers, in which numbers, and what that makes of a shape."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.layers.packing import packed_width
from compress.layers.scheme import BLOCK, NESTED_BLOCK, ActivationScheme, Numbers, QuantizedLayer
from compress.methods.base import Estimate
from compress.methods.linear_layers import LinearsMethod
from compress.models.files.headers import TensorInfo
from compress.models.shape import HALF_BYTES, ModelShape

if TYPE_CHECKING:
    pass

Bits = Literal[2, 3, 4, 5, 6, 8]


class QuantizeLinears(LinearsMethod):
    """A method that replaces linear layers by quantized ones."""

    @abstractmethod
    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return how the layer of that name is to be stored."""

    def estimate(self, shape: ModelShape) -> Estimate:
        """Size after: the weights' bits, their scales and zeros; everything else in half precision.

        Raises:
            ValueError: a pattern matches no linear layer, or there is none left.
        """
        linears, names = self.linears_of(shape)
        chosen = {name: self.numbers_of(name) for name in names}
        tensors = dict(shape.as_stored().tensors)
        for name, layer in chosen.items():
            del tensors[f"{name}.weight"]
            stored = stored_tensors(layer, *linears[name].shape)
            if stored["weight"].dtype == "I8":  # zeros stay zeros, and packed integers are not taken apart
                stored["weight"] = replace(stored["weight"], density=linears[name].density)
            tensors |= {f"{name}.{part}": info for part, info in stored.items()}
        weights = sum(linears[name].parameters for name in chosen)
        largest = max(linears[name].parameters for name in chosen)
        prefixes = tuple(f"{name}." for name in chosen)
        size = sum(info.bytes for name, info in tensors.items() if name.startswith(prefixes) and not name.endswith(".bias"))
        everything = sum(info.parameters for info in linears.values())
        bits = 8 * (size + HALF_BYTES * (everything - weights)) / everything
        kinds = ", ".join(sorted({layer.name for layer in chosen.values()}))
        schemes = ", ".join(sorted({layer.activations for layer in chosen.values()}))
        return Estimate(
            after=replace(shape, tensors=tensors, packed={**shape.packed, **{name: linears[name].shape for name in chosen}}),
            memory_bytes=largest * (4 + 4 + 1) + self.work_bytes([linears[name] for name in chosen]),
            bytes_touched=weights * (4 + 4 + 1),
            flops=self.work_flops([linears[name] for name in chosen]),
            quantized=chosen,
            note=f"{len(chosen)} linear layers, {weights / 1e6:,.1f} M weights to {kinds}, activations {schemes}; "
            f"{bits:.2f} bits a weight of these layers, scales counted",
        )


def stored_tensors(layer: QuantizedLayer, outputs: int, inputs: int) -> dict[str, TensorInfo]:
    """Return the tensors that store a quantized weight [outputs, inputs], in the place of `weight`."""
    per_channel = TensorInfo("F32", (outputs,))
    if layer.numbers is Numbers.FLOAT8:
        return {"weight": TensorInfo("F8_E4M3", (outputs, inputs)), "weight_scale": per_channel}
    if layer.numbers is Numbers.LLM_INT8:
        return {"weight": TensorInfo("I8", (outputs, inputs)), "weight_scale": per_channel}
    if layer.numbers in (Numbers.NF4, Numbers.FP4):
        count = outputs * inputs
        blocks = -(-count // BLOCK)
        return {
            "weight": TensorInfo("U8", (-(-count // 2), 1)),
            "weight_scale": TensorInfo("U8", (blocks,)),
            "weight_nested_scale": TensorInfo("F32", (-(-blocks // NESTED_BLOCK),)),
            "weight_nested_offset": TensorInfo("F32", ()),
        }
    groups = -(-inputs // (layer.group_size or inputs))
    plain = layer.bits == 8 and layer.symmetric
    tensors = {
        "weight": TensorInfo("I8", (outputs, inputs)) if plain else TensorInfo("U8", (outputs, packed_width(inputs, layer.bits))),
        "weight_scale": per_channel if layer.group_size is None else TensorInfo("F16", (outputs, groups)),
    }
    if not layer.symmetric:
        tensors["weight_zero"] = TensorInfo("U8", (outputs, packed_width(groups, layer.bits)))
    if layer.activations is ActivationScheme.STATIC_PER_TENSOR:
        tensors["input_scale"] = TensorInfo("F32", ())
    if layer.input_factor:
        tensors["input_factor"] = TensorInfo("F32", (inputs,))
    return tensors


class Override(BaseModel):
    """What another precision than the step's own is, for the layers of a pattern."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    bits: Bits | None = None
    group_size: int | None = Field(None, ge=8)
    symmetric: bool | None = None


class IntegerWeights(QuantizeLinears):
    """A method that gives linear layers integer weights."""

    bits: Bits = 8
    """Bits of a weight."""
    group_size: int | None = Field(None, ge=8)
    """Inputs that share a scale, in half precision; left out: an output channel has one scale, in float32."""
    symmetric: bool = True
    """Whether zero is the middle of the integers; otherwise each group has a zero of its own, which costs `bits` more a group."""
    overrides: dict[str, Override] = Field(default={})
    """Other precisions by pattern of the layer's name, the last that matches: {"*.down_proj": {bits: 8}}."""

    def patterns(self) -> Iterable[str]:
        """Return the patterns of `skip` and `overrides`."""
        return (*self.skip, *self.overrides)

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's own precision, or what an override changes of it."""
        settings: dict[str, object] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        settings |= overridden(name, self.overrides)
        return QuantizedLayer(**settings)  # type: ignore[arg-type]


def overridden(name: str, overrides: Mapping[str, Override]) -> dict[str, object]:
    """Return the settings of the overrides that match a name, later ones over earlier ones."""
    found: dict[str, object] = {}
    for pattern, override in overrides.items():
        if fnmatchcase(name, pattern):
            found |= override.model_dump(exclude_unset=True)
    return found
