"""Round to nearest: each weight becomes the nearest value of its grid. No calibration, seconds even for large models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.methods.quantize.base import IntegerWeights
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class RTN(IntegerWeights):
    """Round linear layers to integers of `bits` bits.

    With 8 bits and activations `dynamic_per_token` this is the W8A8 arithmetic of LLM.int8() without its outlier columns (Dettmers
    et al. 2022, arXiv 2208.07339, section 2.1: row-wise times column-wise scales).
    """

    method: Literal["rtn"] = "rtn"
    activations: Literal["none", "dynamic_per_tensor", "dynamic_per_token"] = "dynamic_per_token"
    """What the layer's input becomes: nothing (weights alone are quantized; smaller, not faster), or int8 with one scale per
    tensor or per token."""
    search: bool = False
    """Whether each scale is the one with the least squared error of the weights, rather than the one that clips none."""

    @model_validator(mode="after")
    def _integer_products_have_one_scale_a_channel(self) -> Self:
        others = any(other.group_size or other.symmetric is False for other in self.overrides.values())
        if self.activations != "none" and (self.group_size or not self.symmetric or others):
            raise ValueError("groups and zeros go with `activations: none`; integer products have one scale per output channel")
        return self

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the layer's precision, with the step's activations."""
        return super().numbers_of(name).model_copy(update={"activations": ActivationScheme(self.activations)})

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `QuantizedLinear`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QuantizedLinear

        quantized = {}
        for name, linear in self.linears_in(parts).items():
            wanted, weight = self.numbers_of(name), linear.weight.detach()
            grid = find_grid(weight, wanted.bits, wanted.group_size, wanted.symmetric, search=self.search)
            layer = QuantizedLinear.from_integers(grid.round(weight), grid, linear.bias, wanted.activations)
            replace_module(parts, name, layer)
            quantized[name] = layer.layer
        return quantized
