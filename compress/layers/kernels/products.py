"""The int8 product: exact 32-bit sums, scaled by row and by column, with the bias, in one pass that writes the compute dtype.

`torch._int_mm` writes the 32-bit sums to memory, and three more operators read them. Here nothing but the result is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from compress.layers.kernels import launching_on
from compress.layers.kernels.rounding import round_to
from compress.layers.kernels.tiles import Tile, tile_for

GROUP = 8
"""Number of row tiles that share a column tile's weights in the cache, one after another."""


@triton.jit
def _tile_of(program, row_tiles, output_tiles, GROUP: tl.constexpr):
    """Return the tile of a program. Programs of a group read the same few weights while these are in the cache."""
    in_group = GROUP * output_tiles
    first = (program // in_group) * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    inside = program % in_group
    return first + inside % size, inside // size


@triton.jit
def _store_scaled(
    sums, y, x_scale, weight_scale, bias, row_tile, output_tile, rows, outputs,
    SCALED_ROWS: tl.constexpr, BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Scale a tile of sums in float32, add the bias and store it, all in the order of the separate operators."""
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = output_tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    scaled = sums.to(tl.float32) * tl.load(weight_scale + output, mask=output < outputs, other=0.0)[None, :]
    if SCALED_ROWS:
        scaled = scaled * tl.load(x_scale + row, mask=row < rows, other=0.0)[:, None]
    else:
        scaled = scaled * tl.load(x_scale)
    if BIAS:
        scaled = scaled + tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = y + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(place, round_to(scaled, y.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, weight, y, x_scale, weight_scale, bias, rows, outputs, INPUTS: tl.constexpr, x_stride,
    SCALED_ROWS: tl.constexpr, BIAS: tl.constexpr, WHOLE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    row_tile, output_tile = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(outputs, BLOCK_OUTPUTS), GROUP)
    # Tiles over the edge read the matrix's first rows again; their results are not stored.
    row = (row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)) % rows
    output = (output_tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)) % outputs
    column = tl.arange(0, BLOCK_INPUTS)
    x_place = x + row.to(tl.int64)[:, None] * x_stride + column[None, :]
    weight_place = weight + output.to(tl.int64)[None, :] * INPUTS + column[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), dtype=tl.int32)
    for start in tl.range(0, INPUTS, BLOCK_INPUTS):
        if WHOLE:
            a, b = tl.load(x_place), tl.load(weight_place)
        else:
            a = tl.load(x_place, mask=(column < INPUTS - start)[None, :], other=0)
            b = tl.load(weight_place, mask=(column < INPUTS - start)[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        x_place += BLOCK_INPUTS
        weight_place += BLOCK_INPUTS
    _store_scaled(
        sums, y, x_scale, weight_scale, bias, row_tile, output_tile, rows, outputs,
        SCALED_ROWS, BIAS, BLOCK_ROWS, BLOCK_OUTPUTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _product_by_descriptor(
    x, weight, y, x_scale, weight_scale, bias, rows, outputs, INPUTS: tl.constexpr,
    SCALED_ROWS: tl.constexpr, BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BLOCK_INPUTS: tl.constexpr,
):  # fmt: skip
    """`_product` with tiles that the tensor memory accelerator copies."""
    row_tile, output_tile = _tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(outputs, BLOCK_OUTPUTS), GROUP)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), dtype=tl.int32)
    for start in tl.range(0, INPUTS, BLOCK_INPUTS):
        a = x.load([row_tile * BLOCK_ROWS, start])  # zeros over the edges
        b = weight.load([output_tile * BLOCK_OUTPUTS, start])
        sums = tl.dot(a, b.T, sums, out_dtype=tl.int32)
    _store_scaled(
        sums, y, x_scale, weight_scale, bias, row_tile, output_tile, rows, outputs,
        SCALED_ROWS, BIAS, BLOCK_ROWS, BLOCK_OUTPUTS,
    )  # fmt: skip


def int8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Return `(x weight^T) * weight_scale * x_scale + bias`.

    Args:
        x: int8 [rows, inputs].
        weight: int8 [outputs, inputs], contiguous.
        x_scale: float32 [rows, 1], or a single value for all rows.
        weight_scale: float32 [outputs].
        bias: [outputs], any floating dtype; None for none.
        dtype: float32, float16 or bfloat16, of the result.
        tile: tile sizes; None takes those of the table.

    Returns:
        [rows, outputs]. Sums are exact in 32 bits, scaled in float32, and rounded once.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    y = torch.empty((rows, outputs), dtype=dtype, device=x.device)
    if not rows:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    tile = tile or tile_for("int8", rows, outputs, inputs)
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(outputs, tile.outputs)
    settings = {
        "SCALED_ROWS": x_scale.numel() == rows and rows > 1, "BIAS": bias is not None, "GROUP": GROUP,
        "BLOCK_ROWS": tile.rows, "BLOCK_OUTPUTS": tile.outputs, "BLOCK_INPUTS": tile.inputs,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    ends = (y, x_scale, weight_scale, weight_scale if bias is None else bias, rows, outputs, inputs)
    if tile.descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        cut = TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs])
        weights = TensorDescriptor.from_tensor(weight, [tile.outputs, tile.inputs])
        with launching_on(x):
            _product_by_descriptor[(tiles,)](cut, weights, *ends, **settings)
    else:
        with launching_on(x):
            _product[(tiles,)](x, weight, *ends, x.stride(0), WHOLE=inputs % tile.inputs == 0, **settings)
    return y


class TritonMatmul:
    """The kernel behind the interface of `compress.layers.int8_matmul.Int8Matmul`."""

    name = "triton"

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._weight, self._scale = weight.contiguous(), scale.contiguous()
        self._one = torch.ones((), device=weight.device)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply; see `Int8Matmul`."""
        return int8_product(x, self._weight, self._one, self._scale, None, dtype)

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Multiply, scale and add; see `Int8Matmul.scaled`."""
        return int8_product(x, self._weight, scale, self._scale, bias, dtype)
