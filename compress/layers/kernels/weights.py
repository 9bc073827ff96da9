"""Products with packed integer weights and floating-point inputs, for few tokens, where reading the weight is all of the time.

The weight is read as it is stored: 8-bit values, or two 4-bit values a byte (`compress.layers.packing`), with a scale and a zero
for each output or group of inputs. Values are `(u - zero) * scale` in float32, rounded to the compute dtype, as in
`compress.layers.grid.dequantize`. For many tokens the same decoding writes the whole weight once, for a plain product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from compress.layers.kernels import launching_on
from compress.layers.kernels.rounding import dot, round_to
from compress.layers.kernels.tiles import Tile, tile_for

FEW_TOKENS = 64
"""Largest number of tokens that multiply packed weights. Above it, a plain product is faster."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight as it is stored; see `compress.layers.quantized_linear.QuantizedLinear`."""

    values: torch.Tensor
    """[outputs, width]: int8 for symmetric 8-bit weights, otherwise packed unsigned integers, uint8."""
    scale: torch.Tensor
    """[outputs, groups], float32 or float16."""
    zero: torch.Tensor | None
    """Zeros, uint8 [outputs, groups], unpacked; None: the middle of the range."""
    bits: int
    """4 or 8."""
    inputs: int
    group_size: int | None


@triton.jit
def _decode(
    values, scale, zero, output, outputs, start, parity, width, inputs, groups, group_size,
    DTYPE: tl.constexpr, BITS: tl.constexpr, SIGNED: tl.constexpr, ZEROS: tl.constexpr, ONE_GROUP: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    """Return [outputs, BYTES] values that start at byte `start`; of 4-bit weights those of one parity, which share no byte."""
    PER_BYTE: tl.constexpr = 8 // BITS
    place = start + tl.arange(0, BYTES)
    inside = (output < outputs)[:, None] & (place < width)[None, :]
    read = tl.load(values + output.to(tl.int64)[:, None] * width + place[None, :], mask=inside, other=0)
    column = place * PER_BYTE + parity
    if SIGNED:
        u = read.to(tl.int32) + 128
    elif BITS == 4:
        u = (read.to(tl.int32) >> (4 * parity)) & 15
    else:
        u = read.to(tl.int32)
    if ONE_GROUP:
        at = output * groups + (start * PER_BYTE) // group_size
        s = tl.load(scale + at, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
        z = tl.load(zero + at, mask=output < outputs, other=0).to(tl.float32)[:, None] if ZEROS else 2.0 ** (BITS - 1)
    else:
        many = output[:, None] * groups + (column // group_size)[None, :]
        known = inside & (column < inputs)[None, :]
        s = tl.load(scale + many, mask=known, other=0.0).to(tl.float32)
        z = tl.load(zero + many, mask=known, other=0).to(tl.float32) if ZEROS else 2.0 ** (BITS - 1)
    return round_to((u.to(tl.float32) - z) * s, DTYPE)


@triton.jit(do_not_specialize=["rows"])
def _few(
    x, values, scale, zero, bias, y, rows, outputs, inputs, width: tl.constexpr, groups, group_size,
    BITS: tl.constexpr, SIGNED: tl.constexpr, ZEROS: tl.constexpr, ONE_GROUP: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_OUTPUTS), dtype=tl.float32)
    for start in tl.range(0, width, BYTES):
        for parity in tl.static_range(PER_BYTE):
            w = _decode(
                values, scale, zero, output, outputs, start, parity, width, inputs, groups, group_size,
                x.dtype.element_ty, BITS, SIGNED, ZEROS, ONE_GROUP, BYTES,
            )  # fmt: skip
            column = (start + tl.arange(0, BYTES)) * PER_BYTE + parity
            known = (row < rows)[:, None] & (column < inputs)[None, :]
            a = tl.load(x + row[:, None] * inputs + column[None, :], mask=known, other=0.0)
            sums = dot(a, tl.trans(w), sums)
    if BIAS:
        sums += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    place = y + row[:, None] * outputs + output[None, :]
    tl.store(place, round_to(sums, y.dtype.element_ty), mask=(row < rows)[:, None] & (output < outputs)[None, :])


@triton.jit
def _unpack(
    values, scale, zero, y, outputs, inputs, width, groups, group_size,
    BITS: tl.constexpr, SIGNED: tl.constexpr, ZEROS: tl.constexpr, ONE_GROUP: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    PER_BYTE: tl.constexpr = 8 // BITS
    output = tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    start = tl.program_id(1) * BYTES
    for parity in tl.static_range(PER_BYTE):
        w = _decode(
            values, scale, zero, output, outputs, start, parity, width, inputs, groups, group_size,
            y.dtype.element_ty, BITS, SIGNED, ZEROS, ONE_GROUP, BYTES,
        )  # fmt: skip
        column = (start + tl.arange(0, BYTES)) * PER_BYTE + parity
        known = (output < outputs)[:, None] & (column < inputs)[None, :]
        tl.store(y + output.to(tl.int64)[:, None] * inputs + column[None, :], w, mask=known)


def _arguments(packed: PackedWeight, bytes_at_once: int) -> tuple[tuple[int, ...], dict[str, object]]:
    """Return the sizes and the constants that both kernels take."""
    size = packed.group_size or packed.inputs
    at_once = bytes_at_once * (8 // packed.bits)
    groups = packed.scale.shape[1]
    constants: dict[str, object] = {
        "BITS": packed.bits,
        "SIGNED": packed.values.dtype == torch.int8,
        "ZEROS": packed.zero is not None,
        "ONE_GROUP": groups == 1 or size % at_once == 0,
        "BYTES": bytes_at_once,
    }
    return (packed.inputs, packed.values.shape[1], groups, size), constants


def _bytes_at_once(packed: PackedWeight, inputs: int) -> int:
    """Return the bytes of a row that are read at once: those of `inputs` values, or of a group where that is smaller."""
    values = inputs
    while packed.group_size and packed.group_size % values and values > 16 * (8 // packed.bits):
        values //= 2
    return values * packed.bits // 8


def few_token_product(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None, tile: Tile | None = None
) -> torch.Tensor:
    """Return `x W^T + bias` with sums in float32.

    Args:
        x: [rows, inputs], float32, float16 or bfloat16.
        packed: the weight, [outputs, inputs].
        bias: [outputs] or None.
        tile: tile sizes; None takes those of the table.

    Returns:
        [rows, outputs] in the dtype of `x`.
    """
    rows, outputs = x.shape[0], packed.values.shape[0]
    y = torch.empty((rows, outputs), dtype=x.dtype, device=x.device)
    if not rows:
        return y
    tile = tile or tile_for("weights", rows, outputs, packed.inputs)
    sizes, constants = _arguments(packed, _bytes_at_once(packed, tile.inputs))
    grid = (triton.cdiv(outputs, tile.outputs), triton.cdiv(rows, tile.rows))
    zero, offset = (packed.values if tensor is None else tensor for tensor in (packed.zero, bias))
    with launching_on(x):
        _few[grid](
            x.contiguous(), packed.values, packed.scale, zero, offset, y, rows, outputs, *sizes, BIAS=bias is not None,
            BLOCK_ROWS=tile.rows, BLOCK_OUTPUTS=tile.outputs, num_warps=tile.warps, num_stages=tile.stages, **constants,
        )  # fmt: skip
    return y


def unpacked(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight's values, [outputs, inputs] in `dtype`, in one pass."""
    outputs = packed.values.shape[0]
    y = torch.empty((outputs, packed.inputs), dtype=dtype, device=packed.values.device)
    at_once = _bytes_at_once(packed, 128)
    sizes, constants = _arguments(packed, at_once)
    grid = (triton.cdiv(outputs, 32), triton.cdiv(sizes[1], at_once))
    zero = packed.values if packed.zero is None else packed.zero
    with launching_on(y):
        _unpack[grid](packed.values, packed.scale, zero, y, outputs, *sizes, BLOCK_OUTPUTS=32, **constants)
    return y
