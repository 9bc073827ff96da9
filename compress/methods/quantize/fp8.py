"""FP8: weights and, token by token, activations in E4M3. As small as int8 and better with outliers, for GPUs that multiply it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts


class FP8(QuantizeLinears):
    """Round linear layers to E4M3 with one scale per output channel (Micikevicius et al. 2022, arXiv 2209.05433)."""

    method: Literal["fp8"] = "fp8"
    activations: Literal["none", "dynamic_per_token"] = "dynamic_per_token"
    """How the layer's input is quantized: not at all, or to E4M3 with one scale per token."""

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return E4M3 with the step's activations."""
        return QuantizedLayer(numbers=Numbers.FLOAT8, bits=8, activations=ActivationScheme(self.activations))

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`."""
        from compress.layers.float8_linear import Float8Linear

        for name, linear in linears.items():
            yield name, Float8Linear.from_float(linear, ActivationScheme(self.activations))
