"""SmoothQuant: int8 weights and activations, after large activation channels have been moved into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.statistics import Moments
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts

# Number of tokens on which the search compares outputs, and the exponents that it tries.
SAMPLE_ROWS, ALPHAS = 512, (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class _Smoothed:
    """An input after smoothing."""

    names: tuple[str, ...]
    """The layers that share it."""
    factor: torch.Tensor | None
    """What these layers divide it by, float32 [in]; None: nothing, because it is not smoothed or because the layer before
    divides."""
    largest: torch.Tensor
    """Largest magnitude of each channel on the calibration texts after smoothing, float32 [in]."""


class SmoothQuant(QuantizeLinears):
    """W8A8 with each input channel divided by s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) and the weights multiplied by it.

    Xiao et al. 2022, arXiv 2211.10438, section 4. Where the preceding norm or linear layer can do the division at no cost, it does;
    elsewhere the layer keeps the vector s and divides its input by it.
    """

    method: Literal["smoothquant"] = "smoothquant"
    activations: Literal["dynamic_per_token", "static_per_tensor"] = "dynamic_per_token"
    """How the layer's input is quantized to int8: with one scale per token, computed at run time, or with a single scale from
    calibration, which is faster to run and less robust."""
    alpha: float | None = Field(None, ge=0, le=1)
    """How much of the difficulty moves into the weights (0.5 in the paper); 0 leaves the input as it is. By default, for each
    input, the value with the smallest squared error of the outputs on calibration tokens, each token relative to its size."""
    keep_factors: bool = True
    """Whether a layer keeps its scaling factors where no preceding layer can take them. If false, such an input is not scaled, and
    the variant can be exported to formats without factors."""
    range: Literal["mse", "percentile", "minmax"] = "mse"
    """How the end of a static scale is chosen: by the smallest squared error of the inputs, by their `percentile`, or as the
    largest magnitude seen."""
    percentile: float = Field(99.99, gt=50, le=100)
    """Percentile of the input magnitudes at which a static scale ends, for `range: percentile`."""

    @model_validator(mode="after")
    def _keys_have_an_effect(self) -> Self:
        if self.activations != "static_per_tensor" and self.range != "mse":
            raise ValueError("`range` has no effect: it is that of a static scale (`activations: static_per_tensor`)")
        if self.range != "percentile" and self.percentile != 99.99:
            raise ValueError("`percentile` has no effect without `range: percentile`")
        return self

    @property
    def calibrates(self) -> bool:
        """Always: activations decide the smoothing."""
        return True

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return int8 with the step's activations. Whether an input keeps a factor is known only after `apply`."""
        return QuantizedLayer(
            bits=8, activations=ActivationScheme(self.activations), input_factor=self.keep_factors and self.alpha != 0
        )

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`."""
        import torch

        from compress.calibration.statistics import Moments
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QMAX, QuantizedLinear

        assert inputs is not None, "smoothquant calibrates"
        statistics = self.statistics_of(parts, linears, inputs, partial(Moments, keep=SAMPLE_ROWS))
        smoothed = [self._smooth(parts, inputs, {name: linears[name] for name in names}, moments) for names, moments in statistics]
        ends = self._ends(parts, inputs, linears, smoothed) if self.activations == "static_per_tensor" else None
        for number, each in enumerate(smoothed):
            for name in each.names:
                weight = linears[name].weight.detach()
                weight = weight if each.factor is None else weight.float() * each.factor
                grid = find_grid(weight, 8)
                layer = QuantizedLinear.from_integers(
                    grid.round(weight),
                    grid,
                    linears[name].bias,
                    ActivationScheme(self.activations),
                    input_scale=None if ends is None else torch.tensor(ends[number] / QMAX),
                    input_factor=each.factor,
                )
                yield name, layer

    def _smooth(self, parts: Parts, inputs: Inputs, layers: dict[str, nn.Linear], moments: Moments) -> _Smoothed:
        """Smooth the common input of some layers: equation 3, (X / s) (s W)."""
        import torch

        from compress.calibration.input_factors import scale_inputs

        factor = self._factor(moments, torch.cat([layer.weight.detach().float() for layer in layers.values()]))
        if factor is None:
            return _Smoothed(tuple(layers), None, moments.largest)
        # Fold 1 / s into the layer before; if none can take it, the layers keep s, or the input stays as it is.
        kept = scale_inputs(parts, inputs, list(layers.values()), factor)
        if kept is not None and not self.keep_factors:
            return _Smoothed(tuple(layers), None, moments.largest)
        return _Smoothed(tuple(layers), kept, moments.largest / factor)

    def _factor(self, moments: Moments, weight: torch.Tensor) -> torch.Tensor | None:
        """Return s for an input, float32 [in], or None for no smoothing; `weight`: rows of all layers that read it."""
        columns = weight.abs().amax(dim=0)
        alpha = self.alpha
        if alpha is None:
            rows = moments.rows()
            alpha = min(ALPHAS, key=lambda tried: self._error(rows, weight, _smoothing(moments.largest, columns, tried)))
        return _smoothing(moments.largest, columns, alpha) if alpha else None

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

    def _ends(self, parts: Parts, inputs: Inputs, linears: dict[str, nn.Linear], smoothed: Sequence[_Smoothed]) -> list[float]:
        """Return the magnitude at which the static scale of each smoothed input ends."""
        from compress.calibration.statistics import Magnitudes
        from compress.layers.quantized_linear import QMAX

        if self.range == "minmax":
            return [max(float(each.largest.max()), 1e-12) for each in smoothed]
        by_leader = {each.names[0]: each for each in smoothed}
        # A little above the largest magnitude: it was divided here, while a norm or a layer divides on the second pass.
        seen = {leader: Magnitudes(1.01 * float(each.largest.max())) for leader, each in by_leader.items()}

        def see(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
            factor = by_leader[leader].factor
            smooth = rows.float() if factor is None else rows / factor
            seen[leader].add(smooth, counts / smooth.square().mean(dim=1).clamp_min(1e-12))

        inputs.see(parts, {leader: linears[leader] for leader in by_leader}, see)
        if self.range == "percentile":
            return [found.percentile(self.percentile) for found in seen.values()]
        return [found.least_error(QMAX) for found in seen.values()]


def _smoothing(largest: torch.Tensor, columns: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return equation 4, s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), from the two maxima of each channel: float32 [in]."""
    import torch

    factor = largest**alpha / columns ** (1 - alpha) if alpha else torch.ones_like(largest)
    # A channel that is zero in all texts or in all weights needs no smoothing.
    return torch.where(factor.isfinite() & (factor > 0), factor.clamp_min(1e-5), torch.ones_like(factor))
