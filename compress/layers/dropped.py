"""What stands in a block for a sublayer that was dropped, called as the sublayer was."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class First(nn.Module):
    """Gives back what it was given first."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return it."""
        return hidden_states


class FirstOfTwo(nn.Module):
    """`First` where a block takes attention probabilities too."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return it, and no probabilities."""
        return hidden_states, None


class Zeros(nn.Module):
    """Adds nothing to a residual."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros like the input."""
        return torch.zeros_like(hidden_states)


class ZerosOfTwo(nn.Module):
    """`Zeros` where a block takes attention probabilities too."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return zeros like the input, and no probabilities."""
        return torch.zeros_like(hidden_states), None


STAND_INS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (First, FirstOfTwo, Zeros, ZerosOfTwo)}
