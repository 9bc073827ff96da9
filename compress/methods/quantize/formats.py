"""Methods that give linear layers weights in integers or in four-bit floating point."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from compress.layers.scheme import FLOAT4_GROUPS, ActivationScheme, Numbers, QuantizedLayer
from compress.methods.base import overridden
from compress.methods.quantize.base import NULLS, IntegerWeights, Override

if TYPE_CHECKING:
    import torch

    from compress.layers.compressed import CompressedLinear
    from compress.layers.float4 import AnyGrid

Format = Literal["int", "mxfp4", "nvfp4"]
INTEGERS: Format = "int"
DECIDED = ("bits", "group_size", "symmetric", "search")
"""Keys that only integers leave open."""


class FormatOverride(Override):
    """Number format and precision of the layers that match a pattern, where they differ from the step's own."""

    format: Format | None = None
    """Number format of the weights; by default the step's own."""


class FormattedWeights(IntegerWeights):
    """A method that gives linear layers weights in integers, MXFP4 or NVFP4.

    MXFP4: OCP Microscaling Formats specification 1.0, section 5.4. NVFP4: NVIDIA 2025, arXiv 2509.25149. Scales are those of the
    compressed-tensors package (`compress.layers.float4`).
    """

    format: Format = INTEGERS
    """Number format of the weights: integers of `bits` bits, or floating point of four bits (E2M1) with a power of two for each
    group of 32 inputs (`mxfp4`), or with an E4M3 scale for each group of 16 and a float32 scale for each layer (`nvfp4`). Floating
    point goes with `activations: none` and leaves `bits`, `group_size`, `symmetric` and `search` to the format."""
    overrides: dict[str, FormatOverride] = Field(default={})  # type: ignore[assignment]  # says what its layers may say, and more
    """Other precisions for some layers, by pattern of their names, such as {"*.down_proj": {format: int, bits: 8}}; the last match
    wins."""

    @model_validator(mode="after")
    def _the_format_decides_the_rest(self) -> Self:
        if self.format != INTEGERS:
            check_float4(Numbers(self.format), {key: getattr(self, key) for key in DECIDED if key in self.model_fields_set})
        return self

    @model_serializer(mode="wrap")
    def _without_what_the_format_decides(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Records keep every key and are read back: the integers' defaults would say what is not so.
        return {key: value for key, value in write(self).items() if self.format == INTEGERS or key not in DECIDED}

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's own format and precision, changed by the overrides that match the layer's name.

        Raises:
            ValueError: the overrides give a format of floating point other bits, groups or zeros than it has.
        """
        given = overridden(name, self.overrides, NULLS)
        format = given.pop("format", self.format)
        if format == INTEGERS:
            own = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
            return QuantizedLayer(**own | {key: given[key] for key in own if key in given})
        numbers = Numbers(format)
        check_float4(numbers, {key: given[key] for key in DECIDED if key in given}, f"{name}: ")
        return QuantizedLayer(numbers=numbers, bits=4, group_size=FLOAT4_GROUPS[numbers])

    def any_grid_of(self, name: str, weight: torch.Tensor, *, search: bool, importance: torch.Tensor | None = None) -> AnyGrid:
        """Return the grid of a layer's weight, [out, in], in the layer's format; only integers' scales are searched."""
        from compress.layers.float4 import find_float4_grid

        numbers = self.numbers_of(name).numbers
        if numbers in FLOAT4_GROUPS:
            return find_float4_grid(weight, numbers)
        return self.grid_of(name, weight, search=search, importance=importance)


def check_float4(numbers: Numbers, given: Mapping[str, Any], place: str = "") -> None:
    """See that keys say of a format of four-bit floating point what it is; `place` begins the error.

    Raises:
        ValueError: one says something else.
    """
    own = {"bits": 4, "group_size": FLOAT4_GROUPS[numbers], "symmetric": True, "search": False}
    for key, value in given.items():
        if value != own[key]:
            raise ValueError(
                f"{place}`{key}: {json.dumps(value)}` does not go with `format: {numbers}`, whose weights have 4 bits in groups of "
                f"{own['group_size']}, no zeros and no searched scales; leave it out, or say `format: int`"
            )


def check_float4_activations(numbers: Numbers, activations: ActivationScheme, place: str = "") -> None:
    """See that the inputs of layers in four-bit floating point stay as they are; `place` begins the error.

    Raises:
        ValueError: they would be quantized.
    """
    if numbers in FLOAT4_GROUPS and activations is not ActivationScheme.NONE:
        raise ValueError(f"{place}`format: {numbers}` goes with `activations: none`, not with {activations}")


def stored_layer(
    codes: torch.Tensor, grid: AnyGrid, bias: torch.Tensor | None, scheme: ActivationScheme = ActivationScheme.NONE
) -> CompressedLinear:
    """Return the layer that stores rounded weights: the integers or bits of a grid, uint8 [out, in]."""
    from compress.layers.float4 import Float4Grid
    from compress.layers.float4_linear import Float4Linear
    from compress.layers.quantized_linear import QuantizedLinear

    if isinstance(grid, Float4Grid):
        return Float4Linear.from_codes(codes, grid, bias)
    return QuantizedLinear.from_integers(codes, grid, bias, scheme)
