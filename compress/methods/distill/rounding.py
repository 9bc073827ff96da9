"""Quantization-aware training: floating-point values under the integers are trained and rounded whenever they are used."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.layers.grid import Grid
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear, stored_grid, stored_integers, stored_zeros

SMALLEST_GAIN = 0.01


class Rounded(nn.Module):
    """A weight, float32 [out, in], rounded to a grid of integers whose scales are trained with it.

    Gradients pass the rounding as if it were not there (straight-through estimator: Bengio et al. 2013, arXiv 1308.3432) and are
    zero outside the grid. The gradient of a scale follows from that (LSQ: Esser et al. 2020, arXiv 1902.08153, section 2.1, without
    its gradient scale). Scales are trained as factors of their initial values, so that one learning rate suits all of them.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, grid: Grid, inputs: int) -> None:
        super().__init__()
        self._grid, self._group = grid, grid.group_of(inputs)
        self.register_buffer("scale", grid.scale, persistent=False)
        self.register_buffer("zero", grid.zero, persistent=False)
        # One dimension: such parameters get no weight decay.
        self.gain = nn.Parameter(torch.ones(grid.scale.numel()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest values on the grid, float32 [out, in]."""
        scale, zero = (self._spread(per_group) for per_group in (self._scale(), self.zero))
        low, high = self._grid.lowest - zero, self._grid.highest - zero
        # LSQ, equation 1: v / s, clipped to the grid's ends, outside of which v gets no gradient.
        steps = torch.minimum(torch.maximum(weight / scale, low), high)
        # Equations 1 and 2: round, then times s. `detach` makes the rounding pass gradients on unchanged, so that the gradient of s
        # is # round(v / s) - v / s inside the grid and the grid's end outside (equation 3).
        return (steps + (steps.round() - steps).detach()) * scale

    def grid(self) -> Grid:
        """Return the grid with the scales as trained so far."""
        grid = self._grid
        return Grid(grid.bits, grid.group_size, grid.symmetric, self._scale().detach(), self.zero)

    def _scale(self) -> torch.Tensor:
        scale = self.scale * self.gain.clamp_min(SMALLEST_GAIN).view_as(self.scale)
        if self._grid.group_size is None:
            return scale
        return scale + (scale.half().float() - scale).detach()  # rounded as it is stored, with straight-through gradients

    def _spread(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group if per_group.shape[1] == 1 else per_group[:, self._group.to(per_group.device)]


def learning(layer: QuantizedLinear | QuantizedEmbedding) -> nn.Linear | nn.Embedding:
    """Return a plain layer with the outputs of a quantized one, whose integers and scales can be trained.

    Raises:
        ValueError: the layer divides its input.
    """
    stored = layer.layer
    if stored.input_factor:
        raise ValueError(
            "gets its input divided by factors, so its integers cannot be trained; set `keep_factors: false` in awq or smoothquant"
        )
    plain: nn.Linear | nn.Embedding
    with torch.device("meta"):
        if isinstance(layer, QuantizedEmbedding):
            integers, packed = stored_integers(layer.weight, stored, layer.embedding_dim), None
            plain = nn.Embedding(*integers.shape)
        else:
            integers, packed = layer.integers(), layer.weight_zero
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    scale = layer.weight_scale.float().view(len(integers), -1)
    grid = Grid(stored.bits, stored.group_size, stored.symmetric, scale, stored_zeros(packed, stored, scale).float())
    plain.weight = nn.Parameter(grid.values(integers))
    if isinstance(layer, QuantizedLinear) and layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.float().clone())
    parametrize.register_parametrization(plain, "weight", Rounded(grid, integers.shape[1]))
    return plain


def learned(layer: QuantizedLinear | QuantizedEmbedding, plain: nn.Module) -> None:
    """Store a layer made by `learning`, with what it learned, as the integers and scales of the quantized layer."""
    made = plain.get_submodule("parametrizations.weight")
    rounded, latent = made.get_submodule("0"), made.get_parameter("original")
    assert isinstance(rounded, Rounded)
    grid = rounded.grid()
    layer.weight, layer.weight_scale = stored_grid(grid.round(latent.detach()), grid)
