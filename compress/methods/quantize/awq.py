"""AWQ: input channels with large activations are scaled up before rounding, so that their weights are rounded more finely."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.layers.scheme import QuantizedLayer
from compress.methods.quantize.base import Bits, IntegerWeights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.statistics import Moments
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts

# Number of tokens on which the search compares outputs, and number of exponents that it tries, as many as the authors' code.
SAMPLE_ROWS, STEPS = 512, 20


class AWQ(IntegerWeights):
    """Round W_j s_j with s_j = (mean |X_j|)^alpha, with alpha searched for each input, and divide the input by s.

    Lin et al. 2023, arXiv 2306.00978, section 3.2: alpha comes from a grid, by the squared error of the layers' outputs on
    calibration tokens (here each token's error is relative to its size). After that each group's range is shrunk if that lowers the
    error of its weights, with inputs weighted by their mean square. Where the preceding norm or linear layer can do the division at
    no cost, it does; elsewhere the layer keeps the vector s and divides by it.
    """

    method: Literal["awq"] = "awq"
    bits: Bits = 4
    """Bits per weight."""
    group_size: int | None = Field(64, ge=8)
    """Number of inputs that share a scale; null: one scale per output channel."""
    symmetric: bool = False
    """Whether the integers are centred on zero; otherwise each group stores its own zero point, which costs `bits` more per
    group."""
    search: bool = True
    """Whether ranges are shrunk after the scaling to lower the error."""
    keep_factors: bool = True
    """Whether a layer keeps its scaling factors where no preceding layer can take them. If false, such an input is not scaled, and
    the variant can be exported to formats without factors."""

    @property
    def calibrates(self) -> bool:
        """Always: activations decide the scaling."""
        return True

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the layer's precision. Whether it keeps a factor is known only after `apply`; until then it counts as kept."""
        return super().numbers_of(name).model_copy(update={"input_factor": self.keep_factors})

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`."""
        from compress.calibration.input_factors import scale_inputs
        from compress.calibration.statistics import Moments
        from compress.layers.quantized_linear import QuantizedLinear

        assert inputs is not None, "awq calibrates"
        for names, moments in self.statistics_of(parts, linears, inputs, partial(Moments, keep=SAMPLE_ROWS)):
            factor = self._factor(moments, {name: linears[name].weight.detach().float() for name in names})
            importance = moments.mean_square / factor.square()
            # Equation 2, Q(W s) (X / s): fold 1 / s into the layer before, or else keep s in the layers themselves.
            kept = scale_inputs(parts, inputs, [linears[name] for name in names], factor)
            if kept is not None and not self.keep_factors:
                kept, importance = None, moments.mean_square
            for name in names:
                weight = linears[name].weight.detach()
                weight = weight if kept is None else weight.float() * kept
                # The paper's weight clipping, here by the weights' error, inputs weighted by their mean square.
                grid = self.grid_of(name, weight, search=self.search, importance=importance)
                yield name, QuantizedLinear.from_integers(grid.round(weight), grid, linears[name].bias, input_factor=kept)

    def _factor(self, moments: Moments, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the factor with the smallest relative error of the outputs, float32 [in].

        Args:
            moments: statistics of the layers' common input.
            weights: the layers' weights, float32 [out, in], by name.
        """
        import torch

        from compress.calibration.statistics import relative_error
        from compress.layers.float_layers import linear

        rows, magnitude = moments.rows(), moments.mean_magnitude.clamp_min(1e-4)
        exact = {name: linear(rows, weight) for name, weight in weights.items()}
        best, least = torch.ones_like(magnitude), float("inf")
        for step in range(STEPS):
            # Equation 5: s = s_X^alpha, alpha in [0, 1) on a grid; then scaled to centre around 1, as in the authors' code.
            factor = magnitude ** (step / STEPS)
            factor = factor / (factor.max() * factor.min()).sqrt()
            # Equation 4: L(s) = |Q(W s) (X / s) - W X|, here relative to each token's size.
            error = 0.0
            for name, weight in weights.items():
                scaled = weight * factor
                grid = self.grid_of(name, scaled)
                error += relative_error(linear(rows, grid.values(grid.round(scaled)).div_(factor)), exact[name])
            if error < least:
                best, least = factor, error
        return best
