"""Learned rounding: an offset is added to each weight before it is rounded, and the ranges of groups can shrink."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.grid import Grid, span

LARGEST_OFFSET = 0.5


class Offsets(nn.Module):
    """A weight W on a grid with scale s and zero z: s (clip(round(W / s + V) + z) - z), with V, alpha and beta to be learned.

    Cheng et al. 2023, arXiv 2309.05516, equations 2 to 4: V, in [-0.5, 0.5], decides where the rounding goes, alpha and beta, in
    [0, 1], shrink the range's upper and lower end, from which scale and zero follow. Rounding passes gradients on unchanged
    (straight-through estimator: Bengio et al. 2013, arXiv 1308.3432).
    """

    weight: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    gone: torch.Tensor | None

    def __init__(self, weight: torch.Tensor, grid: Grid, gone: torch.Tensor | None = None) -> None:
        """Start from plain rounding.

        Args:
            weight: the weight, float32 [out, in].
            grid: its grid, at its widest.
            gone: weights that stay zero, bool [out, in]; None: there are none.
        """
        super().__init__()
        self._grid, self._group = grid, grid.group_of(weight.shape[1], weight.device)
        # The ends of a symmetric range are as far from zero as each other; below the middle there is one integer more.
        lowest = 1 if grid.symmetric else 0
        for name, tensor in (
            ("weight", weight),
            ("low", (lowest - grid.zero) * grid.scale),
            ("high", (grid.highest - grid.zero) * grid.scale),
            ("gone", gone),
        ):
            self.register_buffer(name, tensor, persistent=False)
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.upper, self.lower = (nn.Parameter(torch.ones_like(grid.scale)) for _ in range(2))

    def grid(self) -> Grid:
        """Return the grid with the range as learned so far: s and z of equation 4, as a variant stores them."""
        grid = self._grid
        scale, zero = span(self.low * self.lower, self.high * self.upper, grid.bits, grid.symmetric, grid.group_size is not None)
        return Grid(grid.bits, grid.group_size, grid.symmetric, scale, zero.detach())

    def _steps(self, grid: Grid) -> torch.Tensor:
        """Return the rounded weights in units of the scale, from the zero, float32 [out, in]."""
        scale, zero = (x[:, self._group] for x in (grid.scale, grid.zero))
        moved = self.weight / scale + self.offset
        rounded = moved + (moved.round() - moved).detach()
        steps = torch.clamp(rounded, grid.lowest - zero, grid.highest - zero)
        return steps if self.gone is None else steps.masked_fill(self.gone, 0)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the values on the grid, [out, in], in the dtype of the weight in whose place they stand."""
        grid = self.grid()
        return (self._steps(grid) * grid.scale[:, self._group]).to(weight.dtype)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every parameter by `rate` against its gradient's sign, and keep it within its bounds (SignSGD)."""
        for parameter, low, high in (
            (self.offset, -LARGEST_OFFSET, LARGEST_OFFSET),
            (self.upper, 0.0, 1.0),
            (self.lower, 0.0, 1.0),
        ):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign_(), alpha=rate).clamp_(low, high)
                parameter.grad = None

    def state(self) -> tuple[torch.Tensor, ...]:
        """Return copies of the parameters."""
        return tuple(parameter.detach().clone() for parameter in self.parameters())

    @torch.no_grad()
    def restore(self, state: tuple[torch.Tensor, ...]) -> None:
        """Set the parameters to what `state` returned."""
        for parameter, value in zip(self.parameters(), state, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def integers(self) -> tuple[torch.Tensor, Grid]:
        """Return the unsigned integers, uint8 [out, in], and their grid."""
        grid = self.grid()
        return (self._steps(grid) + grid.zero[:, self._group]).to(torch.uint8), grid
