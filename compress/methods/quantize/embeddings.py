"""The token embedding table as integers: it is half of a small model, and reading a row of it costs next to nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Estimate, Method
from compress.methods.quantize.base import Bits, stored_tensors
from compress.models.architectures import is_in_block
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class Embeddings(Method):
    """Round the token embedding table to symmetric integers, with one scale per row or per group of a row.

    The table holds 53 % of MiniLM's parameters, 2 % of NV-Embed-v2's and all of a static model's. Tables of positions and token
    types are left unchanged.
    """

    family: ClassVar[str] = "quantized"
    method: Literal["embeddings"] = "embeddings"
    without_blocks: ClassVar[bool] = True
    bits: Bits = 8
    """Bits per value."""
    group_size: int | None = Field(None, ge=8)
    """Number of values of a row that share a scale; by default the whole row."""
    search: bool = True
    """Whether each scale minimises the squared error; otherwise it is the smallest that clips nothing."""

    def _layer(self) -> QuantizedLayer:
        return QuantizedLayer(bits=self.bits, group_size=self.group_size)

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: the table's bits and its scales.

        Raises:
            ValueError: the model has no table with one row per entry of its vocabulary.
        """
        name = shape.token_table
        if name is None:
            raise ValueError(f"{shape.name} has no token embedding table")
        info = shape.tensors[f"{name}.weight"]
        tensors = dict(shape.as_stored().tensors)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": stored for part, stored in stored_tensors(self._layer(), *info.shape).items()}
        values = info.parameters
        return Estimate(
            after=replace(shape, tensors=tensors, packed={**shape.packed, name: info.shape}),
            memory_bytes=values * (4 + 1),
            bytes_touched=values * (4 + 1),
            quantized={name: self._layer()},
            note=f"token embeddings, {values / 1e6:,.1f} M values to {self._layer().name}",
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace the table, if the segment has it.

        Raises:
            ValueError: a value is NaN or infinite, or the table is not a plain one, for example because it scales its rows.
        """
        import torch
        from torch import nn

        from compress.layers.grid import find_grid
        from compress.layers.quantized_embedding import QuantizedEmbedding
        from compress.models.network.segments import module_in, replace_module, token_table

        name = token_table(parts)
        if name is None or is_in_block(name):
            return {}
        table = module_in(parts, name)
        if type(table) is not nn.Embedding:
            raise ValueError(f"{name} is a {type(table).__name__}, not a plain embedding table; it was not quantized")
        weight = table.weight.detach()
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinity; it was not quantized")
        grid = find_grid(weight, self.bits, self.group_size, search=self.search)
        layer = QuantizedEmbedding.from_integers(grid.round(weight), grid)
        replace_module(parts, name, layer)
        return {name: layer.layer}
