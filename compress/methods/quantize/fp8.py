"""FP8: weights, and activations token by token, in E4M3. As small as int8, and better with outliers, for GPUs that multiply it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class FP8(QuantizeLinears):
    """Round linear layers to E4M3, one scale per output channel (Micikevicius et al. 2022, arXiv 2209.05433)."""

    method: Literal["fp8"] = "fp8"
    activations: Literal["none", "dynamic_per_token"] = "dynamic_per_token"
    """What the layer's input becomes: nothing, or E4M3 with one scale per token."""

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return E4M3 with the step's activations."""
        return QuantizedLayer(numbers=Numbers.FLOAT8, bits=8, activations=ActivationScheme(self.activations))

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `Float8Linear`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        from compress.layers.float8_linear import Float8Linear

        quantized = {}
        for name, linear in self.linears_in(parts).items():
            layer = Float8Linear.from_float(linear, ActivationScheme(self.activations))
            replace_module(parts, name, layer)
            quantized[name] = layer.layer
        return quantized
