"""What methods that quantize linear layers share: the number format of each layer, the estimate, and replacing the layers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from compress.layers.packing import packed_width
from compress.layers.scheme import BLOCK, FLOAT4_GROUPS, NESTED_BLOCK, ActivationScheme, Numbers, QuantizedLayer
from compress.methods.base import Estimate, StepOverride, check_overrides, overridden
from compress.methods.linear_layers import LinearsMethod
from compress.models.files.headers import TensorInfo
from compress.models.shape import HALF_BYTES, ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.layers.grid import Grid
    from compress.models.network.segments import Parts

Bits = Literal[2, 3, 4, 5, 6, 8]
NULLS = frozenset({"group_size"})
"""Keys of an override for which null is a value: one scale per output channel."""
NEED_GROUPS = "`activations: dynamic_per_group` needs a `group_size`: activations are scaled in the weight's groups"


class QuantizeLinears(LinearsMethod):
    """A method that replaces linear layers by quantized ones."""

    family: ClassVar[str] = "quantized"

    @abstractmethod
    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return how the layer of this name will be stored."""

    @abstractmethod
    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """Yield the quantized layers of a segment one after another, by name. Each replaces its original before the next is made.

        Args:
            parts: the segment's modules.
            linears: the layers to quantize, by name; at least one.
            inputs: the calibration texts as they arrive at the segment; not None if the method calibrates.
        """

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a quantized layer; see `quantize`.

        Raises:
            ValueError: a weight is NaN or infinite, or the method cannot quantize a layer.
        """
        from compress.models.network.segments import replace_module

        linears = self.linears_in(parts)
        quantized: dict[str, QuantizedLayer] = {}
        for name, layer in self.quantize(parts, linears, inputs) if linears else ():
            replace_module(parts, name, layer)
            quantized[name] = layer.layer
        return quantized

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: the weights' bits, their scales and zeros, and everything else in half precision.

        Raises:
            ValueError: a pattern matches no linear layer, or no layer is left.
        """
        linears, names = self.linears_of(shape)
        chosen = {name: self.numbers_of(name) for name in names}
        tensors = dict(shape.as_stored().tensors)
        for name, layer in chosen.items():
            del tensors[f"{name}.weight"]
            stored = stored_tensors(layer, *linears[name].shape)
            if stored["weight"].dtype == "I8":  # pruned zeros stay zero; packed integers are stored densely
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
            f"{bits:.2f} bits per weight of these layers, scales included",
        )


def stored_tensors(layer: QuantizedLayer, outputs: int, inputs: int) -> dict[str, TensorInfo]:
    """Return the tensors that replace `weight` for a quantized weight [outputs, inputs]."""
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
    if layer.numbers in FLOAT4_GROUPS:
        packed = {"weight": TensorInfo("U8", (outputs, packed_width(inputs, layer.bits)))}
        if layer.numbers is Numbers.MXFP4:
            return packed | {"weight_scale": TensorInfo("U8", (outputs, groups))}
        return packed | {"weight_scale": TensorInfo("F8_E4M3", (outputs, groups)), "weight_global_scale": TensorInfo("F32", ())}
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


class Override(StepOverride):
    """Precision of the layers that match a pattern, where it differs from the step's own."""

    bits: Bits | None = None
    """Bits per weight; by default the step's own."""
    group_size: int | None = Field(None, ge=8)
    """Number of inputs that share a scale; null: one scale per output channel; by default the step's own."""
    symmetric: bool | None = None
    """Whether the integers are centred on zero; by default the step's own."""


class IntegerWeights(QuantizeLinears):
    """A method that gives linear layers integer weights."""

    bits: Bits = 8
    """Bits per weight."""
    group_size: int | None = Field(None, ge=8)
    """Number of inputs that share a scale, which is then stored in half precision; by default one float32 scale per output
    channel."""
    symmetric: bool = True
    """Whether the integers are centred on zero; otherwise each group stores its own zero point, which costs `bits` more per
    group."""
    overrides: dict[str, Override] = Field(default={})
    """Other precisions for some layers, by pattern of their names, such as {"*.down_proj": {bits: 8}}; the last match wins."""

    def overriding(self) -> Mapping[str, StepOverride]:
        """Return `overrides`."""
        return self.overrides

    @field_validator("overrides")
    @classmethod
    def _overrides_say_something(cls, overrides: dict[str, Override]) -> dict[str, Override]:
        check_overrides(overrides)
        return overrides

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's own precision, changed by the overrides that match the layer's name."""
        settings: dict[str, object] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        settings |= overridden(name, self.overrides, NULLS)
        return QuantizedLayer(**settings)  # type: ignore[arg-type]

    def grid_of(self, name: str, weight: torch.Tensor, *, search: bool = False, importance: torch.Tensor | None = None) -> Grid:
        """Return the grid of a layer's weight, [out, in], in the layer's precision; see `compress.layers.grid.find_grid`."""
        from compress.layers.grid import find_grid

        wanted = self.numbers_of(name)
        return find_grid(weight, wanted.bits, wanted.group_size, wanted.symmetric, search=search, importance=importance)


def check_groups(step: IntegerWeights) -> None:
    """See that weights have groups, which activations with a scale per group share.

    Raises:
        ValueError: some have none.
    """
    sizes = [step.group_size, *(other.group_size for other in step.overrides.values() if "group_size" in other.model_fields_set)]
    if None in sizes:
        raise ValueError(NEED_GROUPS)
