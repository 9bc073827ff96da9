"""Round to nearest: each weight becomes the nearest value of its grid. No calibration; takes seconds even for large models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.methods.base import overridden
from compress.methods.quantize.base import NEED_GROUPS, check_groups
from compress.methods.quantize.formats import FormatOverride, FormattedWeights, check_float4_activations, stored_layer

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts

Activations = Literal["none", "dynamic_per_tensor", "dynamic_per_token", "dynamic_per_group"]
ONE_SCALE = (
    "groups and zeros go with `activations: none` or `dynamic_per_group`; other integer products have one scale per output channel"
)


class LayerOverride(FormatOverride):
    """Format, precision and activations of the layers that match a pattern, where they differ from the step's own."""

    activations: Activations | None = None
    """How the layers' input is quantized; by default the step's own."""


class RTN(FormattedWeights):
    """Round linear layers to integers of `bits` bits, or to four-bit floating point.

    With 8 bits and `activations: dynamic_per_token` this is the W8A8 arithmetic of LLM.int8() without its outlier columns (Dettmers
    et al. 2022, arXiv 2208.07339: one scale per row of the inputs, one per output channel of the weights).
    """

    method: Literal["rtn"] = "rtn"
    activations: Activations = "dynamic_per_token"
    """How the layer's input is quantized: not at all (only weights are quantized: smaller, not faster), or to int8 with one scale
    per tensor, per token, or per token and group of inputs (the groups of the weight)."""
    search: bool = False
    """Whether each scale minimises the squared error of the weights; otherwise it is the smallest that clips no weight."""
    overrides: dict[str, LayerOverride] = Field(default={})  # type: ignore[assignment]  # says what its layers may say, and more
    """Other precisions or activations for some layers, by pattern of their names, such as {"*.down_proj": {bits: 4, activations:
    none}}; the last match wins."""

    @model_validator(mode="after")
    def _integer_products_have_one_scale_a_channel(self) -> Self:
        if any(other.activations is not None for other in self.overrides.values()):
            return self  # which layer gets what is known when their names are: see `numbers_of`
        check_float4_activations(Numbers(self.format), ActivationScheme(self.activations))
        if self.activations == "dynamic_per_group":
            check_groups(self)
            return self
        others = any(other.group_size or other.symmetric is False for other in self.overrides.values())
        if self.activations != "none" and (self.group_size or not self.symmetric or others):
            raise ValueError(ONE_SCALE)
        return self

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's own precision and activations, changed by the overrides that match the layer's name.

        Raises:
            ValueError: the layer would have groups, zeros or a format that its quantized activations do not go with, or no groups
                for them; see also `FormattedWeights.numbers_of`.
        """
        activations = ActivationScheme(overridden(name, self.overrides).get("activations", self.activations))
        layer = super().numbers_of(name).model_copy(update={"activations": activations})
        check_float4_activations(layer.numbers, activations, f"{name}: ")
        if activations is ActivationScheme.DYNAMIC_PER_GROUP:
            if not layer.group_size:
                raise ValueError(f"{name}: {NEED_GROUPS}")
        elif activations is not ActivationScheme.NONE and (layer.group_size or not layer.symmetric):
            raise ValueError(f"{name}: {ONE_SCALE}")
        return layer

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`."""
        for name, linear in linears.items():
            weight = linear.weight.detach()
            grid = self.any_grid_of(name, weight, search=self.search)
            yield name, stored_layer(grid.round(weight), grid, linear.bias, self.numbers_of(name).activations)
