"""Base classes of compressed layers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer


class CompressedLayer(nn.Module):
    """A layer whose buffers keep their stored dtypes, whatever dtype the model around it runs in."""

    layer: QuantizedLayer

    def pack(self) -> None:
        """Prepare to run on the device of the buffers; a second call does nothing. By default nothing is needed."""

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that `unpack` takes; 0 where there is nothing to unpack."""
        return 0

    def unpack(self, dtype: torch.dtype) -> None:
        """Unpack the weight now and keep its values in `dtype`, where each call would unpack it; by default none does."""

    def held(self, dtype: torch.dtype) -> nn.Module:
        """Return an equivalent layer for many calls in `dtype`, at any cost in memory; by default the packed layer itself."""
        self.pack()
        return self


class CompressedLinear(CompressedLayer):
    """A compressed linear layer."""

    bias: torch.Tensor | None

    @property
    def rounds_inputs(self) -> bool:
        """Whether it quantizes its activations."""
        return self.layer.activations is not ActivationScheme.NONE or self.layer.numbers is Numbers.LLM_INT8

    @abstractmethod
    def values(self) -> torch.Tensor:
        """Return the stored weight, for inputs that are not divided by anything: float32 [out, in]."""

    def plain(self) -> nn.Linear:
        """Return an `nn.Linear` with the stored values in float32; its activations are in floating point."""
        weight = self.values()
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.float().clone())
        return plain
