"""Round to nearest: each weight becomes the nearest value of its grid. No calibration; takes seconds even for large models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.methods.quantize.base import IntegerWeights, check_groups

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts


class RTN(IntegerWeights):
    """Round linear layers to integers of `bits` bits.

    With 8 bits and `activations: dynamic_per_token` this is the W8A8 arithmetic of LLM.int8() without its outlier columns (Dettmers
    et al. 2022, arXiv 2208.07339: one scale per row of the inputs, one per output channel of the weights).
    """

    method: Literal["rtn"] = "rtn"
    activations: Literal["none", "dynamic_per_tensor", "dynamic_per_token", "dynamic_per_group"] = "dynamic_per_token"
    """How the layer's input is quantized: not at all (only weights are quantized: smaller, not faster), or to int8 with one scale
    per tensor, per token, or per token and group of inputs (the groups of the weight)."""
    search: bool = False
    """Whether each scale minimises the squared error of the weights; otherwise it is the smallest that clips no weight."""

    @model_validator(mode="after")
    def _integer_products_have_one_scale_a_channel(self) -> Self:
        if self.activations == "dynamic_per_group":
            check_groups(self)
            return self
        others = any(other.group_size or other.symmetric is False for other in self.overrides.values())
        if self.activations != "none" and (self.group_size or not self.symmetric or others):
            raise ValueError(
                "groups and zeros go with `activations: none` or `dynamic_per_group`; other integer products have one scale per "
                "output channel"
            )
        return self

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the layer's precision, with the step's activations."""
        return super().numbers_of(name).model_copy(update={"activations": ActivationScheme(self.activations)})

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`."""
        from compress.layers.quantized_linear import QuantizedLinear

        for name, linear in linears.items():
            weight = linear.weight.detach()
            grid = self.grid_of(name, weight, search=self.search)
            yield name, QuantizedLinear.from_integers(grid.round(weight), grid, linear.bias, ActivationScheme(self.activations))
