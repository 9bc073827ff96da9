"""What every compressed layer is to those who only pass it on: how it is stored, and that it can be prepared to run."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer


class CompressedLayer(nn.Module):
    """A layer whose buffers are kept as they are stored, whatever dtype the model around it runs in."""

    layer: QuantizedLayer

    def pack(self) -> None:
        """Prepare to run on the device the buffers are on; a second call does nothing. By default nothing is needed."""

    def held(self, dtype: torch.dtype) -> nn.Module:
        """Return a layer of the same function for many calls in `dtype`, whatever memory it takes: by default itself, packed."""
        self.pack()
        return self


class CompressedLinear(CompressedLayer):
    """A linear layer that stands for another in floating point."""

    bias: torch.Tensor | None

    @property
    def rounds_inputs(self) -> bool:
        """Whether it quantizes its activations."""
        return self.layer.activations is not ActivationScheme.NONE or self.layer.numbers is Numbers.LLM_INT8

    @abstractmethod
    def values(self) -> torch.Tensor:
        """Return the weight that is stored, for the input as it comes: float32 [out, in]."""

    def plain(self) -> nn.Linear:
        """Return a linear layer of torch's with the values that are stored, float32; its activations are in floating point."""
        weight = self.values()
        with torch.device("meta"):
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.float().clone())
        return plain
