"""What every compressed layer is to those who only pass it on: how it is stored, and that it can be prepared to run."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.scheme import QuantizedLayer


class CompressedLayer(nn.Module):
    """A layer whose buffers are kept as they are stored, whatever dtype the model around it runs in."""

    layer: QuantizedLayer

    def pack(self) -> None:
        """Prepare to run on the device the buffers are on; a second call does nothing. By default nothing is needed."""

    def held(self, dtype: torch.dtype) -> nn.Module:
        """Return a layer of the same function for many calls in `dtype`, whatever memory it takes: by default itself, packed."""
        self.pack()
        return self
