"""Integers that learn: values behind them change in floating point and are rounded whenever they are used."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.layers.grid import Grid
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear, stored_grid, stored_integers, stored_zeros

SMALLEST_GAIN = 0.01


class Rounded(nn.Module):
    """A weight, float32 [out, in], rounded to a grid of integers whose scales are learned with it.

    Gradients pass the rounding as if it were not there (straight through: Bengio et al. 2013, arXiv 1308.3432) and stop where the
    grid ends. The scales' follow from that (LSQ: Esser et al. 2020, arXiv 1902.08153); they are learned as factors of what they
    were, for which one learning rate suits all.
    """

    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, grid: Grid, inputs: int) -> None:
        super().__init__()
        self._grid, self._group = grid, grid.group_of(inputs)
        self.register_buffer("scale", grid.scale, persistent=False)
        self.register_buffer("zero", grid.zero, persistent=False)
        # In a row, as what has no weight decay is.
        self.gain = nn.Parameter(torch.ones(grid.scale.numel()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the values that are nearest on the grid, [out, in]."""
        scale, zero = (self._spread(per_group) for per_group in (self._scale(), self.zero))
        low, high = self._grid.lowest - zero, self._grid.highest - zero
        steps = torch.minimum(torch.maximum(weight / scale, low), high)
        return (steps + (steps.round() - steps).detach()) * scale

    def grid(self) -> Grid:
        """Return the grid as it is now."""
        grid = self._grid
        return Grid(grid.bits, grid.group_size, grid.symmetric, self._scale().detach(), self.zero)

    def _scale(self) -> torch.Tensor:
        scale = self.scale * self.gain.clamp_min(SMALLEST_GAIN).view_as(self.scale)
        if self._grid.group_size is None:
            return scale
        return scale + (scale.half().float() - scale).detach()  # as it is stored

    def _spread(self, per_group: torch.Tensor) -> torch.Tensor:
        return per_group if per_group.shape[1] == 1 else per_group[:, self._group.to(per_group.device)]


def learning(layer: QuantizedLinear | QuantizedEmbedding) -> nn.Linear | nn.Embedding:
    """Return a plain layer that gives what one in integers gives, and learns.

    Raises:
        ValueError: the layer divides its input.
    """
    stored = layer.layer
    if stored.input_factor:
        raise ValueError("is given its input divided by factors, which integers cannot learn beside; awq: `keep_factors: false`")
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
    """Put what `learning` made of a layer, and learned since, back into its integers and scales."""
    made = plain.get_submodule("parametrizations.weight")
    rounded, latent = made.get_submodule("0"), made.get_parameter("original")
    assert isinstance(rounded, Rounded)
    grid = rounded.grid()
    layer.weight, layer.weight_scale = stored_grid(grid.round(latent.detach()), grid)
