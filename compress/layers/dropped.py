"""Stand-ins for dropped sublayers of a block; they take the same arguments as the sublayer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class First(nn.Module):
    """Returns its first argument."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return `hidden_states`."""
        return hidden_states


class FirstOfTwo(nn.Module):
    """`First` for blocks that also expect attention probabilities."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return `hidden_states`, and None as probabilities."""
        return hidden_states, None


class Zeros(nn.Module):
    """Returns zeros: adds nothing to a residual."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return zeros like the input."""
        return torch.zeros_like(hidden_states)


class ZerosOfTwo(nn.Module):
    """`Zeros` for blocks that also expect attention probabilities."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """Return zeros like the input, and None as probabilities."""
        return torch.zeros_like(hidden_states), None


STAND_INS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (First, FirstOfTwo, Zeros, ZerosOfTwo)}
