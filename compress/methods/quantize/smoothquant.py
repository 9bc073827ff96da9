"""SmoothQuant: int8 weights and activations, after the activations' large channels are moved into the weights."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.statistics import Moments
    from compress.models.network.segments import Parts

# Tokens that the search compares outputs on, and the exponents that it tries.
SAMPLE_ROWS, ALPHAS = 512, (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class SmoothQuant(QuantizeLinears):
    """W8A8 with each input channel divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and the weights multiplied by it.

    Xiao et al. 2022, arXiv 2211.10438, section 4. Where the norm or the linear layer before can divide for nothing, it does;
    elsewhere the layer keeps the vector and divides its input by it.
    """

    method: Literal["smoothquant"] = "smoothquant"
    activations: Literal["dynamic_per_token", "static_per_tensor"] = "dynamic_per_token"
    """What the layer's input becomes: int8 with one scale per token, found while running, or with one scale that calibration
    finds, which is faster to run and more fragile."""
    alpha: float | None = Field(None, ge=0, le=1)
    """How much of the difficulty goes into the weights (0.5 in the paper); 0: the input is left as it is; left out: for each input
    the one with the least squared error of the outputs on calibration tokens, each token's relative to its size."""
    keep_factors: bool = True
    """Whether a layer keeps its factor where nothing before it can divide. Without, such an input is left as it is, and the
    variant can be exported to layouts that know no factors."""
    range: Literal["mse", "percentile", "minmax"] = "mse"
    """Where the static scale ends: at the least squared error of the inputs, at their `percentile`, at the largest one seen."""
    percentile: float = Field(99.99, gt=50, le=100)
    """Of the magnitudes, for `range: percentile`."""

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return int8 with the step's activations; whether an input keeps a factor is known only once it is applied."""
        return QuantizedLayer(
            bits=8, activations=ActivationScheme(self.activations), input_factor=self.keep_factors and self.alpha != 0
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `QuantizedLinear`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        import torch

        from compress.calibration.input_factors import scale_inputs
        from compress.calibration.statistics import Moments
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QMAX, QuantizedLinear

        linears = self.linears_in(parts)
        if not linears:
            return {}
        assert inputs is not None  # the segment has linear layers, and the step said that it calibrates
        groups, moments = inputs.gather(parts, linears, partial(Moments, keep=SAMPLE_ROWS))
        factors: dict[str, torch.Tensor | None] = dict.fromkeys(groups)
        largest = {leader: moment.largest for leader, moment in moments.items()}
        for leader, names in groups.items():
            layers = [linears[name] for name in names]
            factor = self._factor(moments.pop(leader), torch.cat([layer.weight.detach().float() for layer in layers]))
            if factor is None:
                continue
            left = scale_inputs(parts, inputs, layers, factor)
            if left is None or self.keep_factors:
                largest[leader], factors[leader] = largest[leader] / factor, left
        ends = self._ends(parts, inputs, linears, factors, largest) if self.activations == "static_per_tensor" else {}
        quantized = {}
        for leader, names in groups.items():
            for name in names:
                weight, left = linears[name].weight.detach(), factors[leader]
                weight = weight if left is None else weight.float() * left
                grid = find_grid(weight, 8)
                layer = QuantizedLinear.from_integers(
                    grid.round(weight),
                    grid,
                    linears[name].bias,
                    ActivationScheme(self.activations),
                    input_scale=torch.tensor(ends[leader] / QMAX) if leader in ends else None,
                    input_factor=left,
                )
                replace_module(parts, name, layer)
                quantized[name] = layer.layer
        return quantized

    def _factor(self, moment: Moments, weight: torch.Tensor) -> torch.Tensor | None:
        """Return what each channel of an input is divided by, float32 [in], None for nothing; `weight`: its layers' rows."""
        columns = weight.abs().amax(dim=0)
        alpha = self.alpha
        if alpha is None:
            rows = moment.rows()
            alpha = min(ALPHAS, key=lambda tried: self._error(rows, weight, _smoothing(moment.largest, columns, tried)))
        return _smoothing(moment.largest, columns, alpha) if alpha else None

    def _error(self, rows: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> float:
        """Return the relative squared error of the outputs of rows [n, in], both sides rounded to int8 after the smoothing."""
        from compress.calibration.statistics import Magnitudes, relative_error
        from compress.layers.float_layers import linear
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QMAX, quantize_symmetric

        smooth, scaled = rows / factor, weight * factor
        if self.activations == "static_per_tensor":
            seen = Magnitudes(float(smooth.abs().max()))
            seen.add(smooth, 1 / smooth.square().mean(dim=1).clamp_min(1e-12))
            scale = smooth.new_tensor(seen.least_error(QMAX) / QMAX)
        else:
            scale = smooth.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / QMAX
        grid = find_grid(scaled, 8)
        made = linear(quantize_symmetric(smooth, scale).float() * scale, grid.values(grid.round(scaled)))
        return relative_error(made, linear(rows, weight))

    def _ends(
        self,
        parts: Parts,
        inputs: Inputs,
        linears: dict[str, nn.Linear],
        factors: dict[str, torch.Tensor | None],
        largest: dict[str, torch.Tensor],
    ) -> dict[str, float]:
        """Return where the static scale of each group's input ends, its channels divided by their factors."""
        from compress.calibration.statistics import Magnitudes
        from compress.layers.quantized_linear import QMAX

        if self.range == "minmax":
            return {leader: max(float(channels.max()), 1e-12) for leader, channels in largest.items()}
        # A little more than the largest magnitude: it was divided by hand here, and by a norm or a layer there.
        seen = {leader: Magnitudes(1.01 * float(channels.max())) for leader, channels in largest.items()}

        def see(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
            factor = factors[leader]
            smooth = rows.float() if factor is None else rows / factor
            seen[leader].add(smooth, counts / smooth.square().mean(dim=1).clamp_min(1e-12))

        inputs.see(parts, {leader: linears[leader] for leader in factors}, see)
        if self.range == "percentile":
            return {leader: found.percentile(self.percentile) for leader, found in seen.items()}
        return {leader: found.least_error(QMAX) for leader, found in seen.items()}


def _smoothing(largest: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the paper's factor from the largest magnitudes of each channel and of each column of the weights: float32 [in]."""
    import torch

    factor = largest**alpha / columns ** (1 - alpha) if alpha else torch.ones_like(largest)
    # A channel that is zero in all texts or all weights asks for nothing.
    return torch.where(factor.isfinite() & (factor > 0), factor.clamp_min(1e-5), torch.ones_like(factor))
