"""A lookup table of integers: rows are unpacked and scaled after the lookup, so the table in memory is as small as on disk."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.compressed import CompressedLayer
from compress.layers.grid import Grid, dequantize
from compress.layers.quantized_linear import stored_grid, stored_integers, stored_scale, stored_weight, stored_zeros
from compress.layers.scheme import QuantizedLayer


class QuantizedEmbedding(CompressedLayer):
    """A symmetric integer table. Its buffers `weight` and `weight_scale` are as in `QuantizedLinear`, with rows as outputs."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(self, layer: QuantizedLayer, width: int, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Take the buffers.

        Raises:
            ValueError: the layer has stored zeros, quantizes activations or divides its input, which a table cannot.
        """
        super().__init__()
        if not layer.symmetric or layer.activations != "none" or layer.input_factor:
            raise ValueError("a table is symmetric and has no activations to quantize")
        self.layer = layer
        self.embedding_dim = width
        self.dtype = torch.float32
        """Dtype of the rows that are returned."""
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)

    @classmethod
    def from_integers(cls, integers: torch.Tensor, grid: Grid) -> QuantizedEmbedding:
        """Take the unsigned integers of a grid, uint8 [rows, width]."""
        layer = QuantizedLayer(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)
        return cls(layer, integers.shape[1], *stored_grid(integers, grid))

    @classmethod
    def empty(cls, table: nn.Embedding, layer: QuantizedLayer) -> QuantizedEmbedding:
        """Return a table in place of `table` whose buffers are on the meta device."""
        width, dtype = stored_weight(layer, table.embedding_dim)
        with torch.device("meta"):
            weight = torch.empty((table.num_embeddings, width), dtype=dtype)
            scale = stored_scale(layer, table.num_embeddings, table.embedding_dim)
        return cls(layer, table.embedding_dim, weight, scale)

    def integers(self) -> torch.Tensor:
        """Return the table's unsigned integers, uint8 [rows, width]."""
        return stored_integers(self.weight, self.layer, self.embedding_dim)

    def zeros(self) -> torch.Tensor:
        """Return the zeros, uint8 [rows, groups]."""
        return stored_zeros(None, self.layer, self.weight_scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [...] to [..., width] in `dtype`."""
        rows = ids.reshape(-1)
        scale = self.weight_scale[rows].view(len(rows), -1)
        integers = stored_integers(self.weight[rows], self.layer, self.embedding_dim)
        zero = stored_zeros(None, self.layer, scale)
        return dequantize(integers, scale, zero, self.layer.group_size, self.dtype).view(*ids.shape, self.embedding_dim)
