"""AWQ: input channels that carry large activations are enlarged before rounding, so that their weights are rounded finer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.layers.scheme import QuantizedLayer
from compress.methods.quantize.base import Bits, IntegerWeights
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    import torch

    from compress.calibration.inputs import Inputs
    from compress.calibration.statistics import Moments
    from compress.models.network.segments import Parts

# Tokens that the search compares outputs on, and the exponents that it tries.
SAMPLE_ROWS, STEPS = 512, 20


class AWQ(IntegerWeights):
    """Round W_j s_j with s_j = (mean |X_j|)^alpha, alpha searched for each input, and divide the input by s.

    Lin et al. 2023, arXiv 2306.00978, section 3.2: alpha from a grid, by the squared error of the layers' outputs on calibration
    tokens (here of each token relative to its size); then each group's range is shrunk where that lowers the error of its weights,
    inputs weighed by their mean square. Where the norm or the linear layer before can divide for nothing, it does; elsewhere the
    layer keeps the vector and divides by it.
    """

    method: Literal["awq"] = "awq"
    bits: Bits = 4
    """Bits of a weight."""
    group_size: int | None = Field(64, ge=8)
    """Inputs that share a scale; null: an output channel has one."""
    symmetric: bool = False
    """Whether zero is the middle of the integers; otherwise each group has a zero of its own, which costs `bits` more a group."""
    search: bool = True
    """Whether ranges are shrunk after the scaling."""
    keep_factors: bool = True
    """Whether a layer keeps its factor where nothing before it can divide. Without, such an input is left as it is, and the
    variant can be exported to layouts that know no factors."""

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the layer's precision; whether its input keeps a factor is known only once it is applied."""
        return super().numbers_of(name).model_copy(update={"input_factor": self.keep_factors})

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `QuantizedLinear`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        from compress.calibration.input_factors import scale_inputs
        from compress.calibration.statistics import Moments
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QuantizedLinear

        linears = self.linears_in(parts)
        if not linears:
            return {}
        assert inputs is not None  # the segment has linear layers, and the step said that it calibrates
        groups, moments = inputs.gather(parts, linears, partial(Moments, keep=SAMPLE_ROWS))
        quantized = {}
        for leader, names in groups.items():
            layers, moment = [linears[name] for name in names], moments.pop(leader)
            factor = self._factor(moment, {name: linears[name].weight.detach().float() for name in names})
            importance = moment.mean_square / factor.square()
            left = scale_inputs(parts, inputs, layers, factor)
            if left is not None and not self.keep_factors:
                left, importance = None, moment.mean_square
            for name in names:
                weight, wanted = linears[name].weight.detach(), super().numbers_of(name)
                weight = weight if left is None else weight.float() * left
                grid = find_grid(
                    weight, wanted.bits, wanted.group_size, wanted.symmetric, search=self.search, importance=importance
                )
                layer = QuantizedLinear.from_integers(grid.round(weight), grid, linears[name].bias, input_factor=left)
                replace_module(parts, name, layer)
                quantized[name] = layer.layer
        return quantized

    def _factor(self, moment: Moments, weights: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the factor of the exponent with the least relative error of the outputs: float32 [in]."""
        import torch

        from compress.calibration.statistics import relative_error
        from compress.layers.float_layers import linear
        from compress.layers.grid import find_grid

        rows, magnitude = moment.rows(), moment.mean_magnitude.clamp_min(1e-4)
        exact = {name: linear(rows, weight) for name, weight in weights.items()}
        best, least = torch.ones_like(magnitude), float("inf")
        for step in range(STEPS):
            factor = magnitude ** (step / STEPS)
            factor = factor / (factor.max() * factor.min()).sqrt()
            error = 0.0
            for name, weight in weights.items():
                wanted, scaled = super().numbers_of(name), weight * factor
                grid = find_grid(scaled, wanted.bits, wanted.group_size, wanted.symmetric)
                error += relative_error(linear(rows, grid.values(grid.round(scaled)).div_(factor)), exact[name])
            if error < least:
                best, least = factor, error
        return best
