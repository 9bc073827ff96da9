"""Kernels over the rows of a matrix: rounding to int8 or FP8 per token, alone or fused with what comes before it.

A row is read once, by one program. Rounding follows the layers bit for bit: int8 as `quantize_symmetric` with the scale
`max|x| / 127`, FP8 as `to_float8` with `max|x| / 448`. A row with a value that is not finite gets the scale NaN, so its products
are NaN, and the embedder refuses its vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from compress.layers.kernels import launching_on
from compress.layers.kernels.rounding import rint, round_to, to_e4m3
from compress.layers.scheme import Numbers

WIDEST = 2**16
"""Widest row that one program holds."""

_DTYPES = {Numbers.INTEGER: torch.int8, Numbers.FLOAT8: torch.float8_e4m3fn}
_ROUNDS = {None: 0, Numbers.INTEGER: 1, Numbers.FLOAT8: 2}


@dataclass(frozen=True)
class Rounded:
    """Rows rounded per token: `values * scale` is about the row."""

    numbers: Numbers
    values: torch.Tensor
    """int8 or E4M3, [rows, width]."""
    scale: torch.Tensor
    """float32 [rows, 1]."""


@dataclass(frozen=True)
class NormKind:
    """How a norm computes."""

    centred: bool
    """Whether it subtracts the mean (LayerNorm: Ba et al. 2016, arXiv 1607.06450) or not (RMSNorm: Zhang and Sennrich 2019,
    arXiv 1910.07467)."""
    rounds_first: bool
    """Whether the normalised row is rounded to the compute dtype before it is multiplied by the weight."""
    offset: float = 0.0
    """What is added to the weight: 1 in Gemma."""


@triton.jit
def _store_rounded(x, values, scales, row, width, columns, ROUNDS: tl.constexpr):
    """Round a row, 0 after its end, and store it with its scale."""
    LARGEST: tl.constexpr = 127.0 if ROUNDS == 1 else 448.0
    broken = tl.max(tl.where(x - x != 0.0, 1, 0), axis=0)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), axis=0), LARGEST), 1e-7)
    scale = tl.where(broken != 0, 1.0, scale)
    x = tl.where(x - x != 0.0, 0.0, x)
    scaled = tl.minimum(tl.maximum(tl.div_rn(x, scale), -LARGEST), LARGEST)
    place = values + row.to(tl.int64) * width + columns
    if ROUNDS == 1:
        tl.store(place, rint(scaled).to(tl.int8), mask=columns < width)
    else:
        tl.store(place, to_e4m3(scaled), mask=columns < width)
    tl.store(scales + row, tl.where(broken != 0, float("nan"), scale))


@triton.jit
def _quantize(x, values, scales, stride, width, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    loaded = tl.load(x + row.to(tl.int64) * stride + columns, mask=columns < width, other=0.0).to(tl.float32)
    _store_rounded(loaded, values, scales, row, width, columns, ROUNDS)


@triton.jit
def _normalize(
    x, weight, bias, y, values, scales, stride, width, eps, offset,
    CENTRED: tl.constexpr, ROUNDS_FIRST: tl.constexpr, BIAS: tl.constexpr, ROUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    loaded = tl.load(x + row.to(tl.int64) * stride + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        loaded = tl.where(inside, loaded - tl.sum(loaded, axis=0) / width, 0.0)
    normal = loaded * tl.rsqrt(tl.sum(loaded * loaded, axis=0) / width + eps)
    if ROUNDS_FIRST:
        normal = round_to(normal, y.dtype.element_ty).to(tl.float32)
    normal = normal * (tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32) + offset)
    if BIAS:
        normal += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    rounded = round_to(normal, y.dtype.element_ty)
    tl.store(y + row.to(tl.int64) * width + columns, rounded, mask=inside)
    if ROUNDS != 0:
        # The dtype's own rounding first, so that the integers are those of the tensor that is returned.
        _store_rounded(rounded.to(tl.float32), values, scales, row, width, columns, ROUNDS)


@triton.jit
def _gated(x, y, values, scales, stride, width, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    place = x + row.to(tl.int64) * stride + columns
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    # Each step rounds to the compute dtype, as the separate operators do.
    active = round_to(tl.div_rn(gate, 1.0 + tl.exp(-gate)), x.dtype.element_ty).to(tl.float32)
    product = round_to(active * up, x.dtype.element_ty)
    if ROUNDS == 0:
        tl.store(y + row.to(tl.int64) * width + columns, product, mask=inside)
    else:
        _store_rounded(product.to(tl.float32), values, scales, row, width, columns, ROUNDS)


def _block(width: int) -> dict[str, int]:
    """Return the launch settings of a kernel over rows of `width` values: 8 to 16 values a thread."""
    if width > WIDEST:
        raise ValueError(f"rows of {width:,} values; a program holds {WIDEST:,}")
    block = max(16, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` as rows whose values lie next to each other: [..., width] to [rows, width]."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _empty(numbers: Numbers | None, rows: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tensors for rounded values and their scales; `like` in place of both where nothing is rounded."""
    if numbers is None:
        return like, like
    values = torch.empty((rows, width), dtype=_DTYPES[numbers], device=like.device)
    return values, torch.empty((rows, 1), dtype=torch.float32, device=like.device)


def quantize(x: torch.Tensor, numbers: Numbers) -> Rounded:
    """Round each row of `x` [..., width], float32, float16 or bfloat16; see the module.

    Raises:
        ValueError: the rows are wider than `WIDEST`.
    """
    rows = _rows(x)
    count, width = rows.shape
    values, scale = _empty(numbers, count, width, rows)
    if count:
        with launching_on(rows):
            _quantize[(count,)](rows, values, scale, rows.stride(0), width, ROUNDS=_ROUNDS[numbers], **_block(width))
    return Rounded(numbers, values, scale)


def normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, kind: NormKind, numbers: Numbers | None = None
) -> tuple[torch.Tensor, Rounded | None]:
    """Normalise each row and, if `numbers` is given, round the result in the same pass.

    Args:
        x: [..., width], float32, float16 or bfloat16.
        weight: [width].
        bias: [width] or None.
        eps: what is added to the mean square.
        kind: how the norm computes.
        numbers: what the result is also rounded to.

    Returns:
        The normalised tensor, as `x` in shape and dtype, and the same rounded.

    Raises:
        ValueError: the rows are wider than `WIDEST`.
    """
    rows = _rows(x)
    count, width = rows.shape
    y = torch.empty((count, width), dtype=x.dtype, device=x.device)
    values, scale = _empty(numbers, count, width, y)
    if count:
        with launching_on(rows):
            _normalize[(count,)](
                rows, weight, weight if bias is None else bias, y, values, scale, rows.stride(0), width, eps, kind.offset,
                CENTRED=kind.centred, ROUNDS_FIRST=kind.rounds_first, BIAS=bias is not None, ROUNDS=_ROUNDS[numbers],
                **_block(width),
            )  # fmt: skip
    return y.view(x.shape), None if numbers is None else Rounded(numbers, values, scale)


def gated(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` (SwiGLU without its products: Shazeer 2020, arXiv 2002.05202), [..., 2 width] to [..., width].

    The gate is the first half of `x`.
    """
    rows = _rows(x)
    count, width = rows.shape[0], rows.shape[1] // 2
    y = torch.empty((count, width), dtype=x.dtype, device=x.device)
    if count:
        with launching_on(rows):
            _gated[(count,)](rows, y, y, y, rows.stride(0), width, ROUNDS=0, **_block(width))
    return y.view(*x.shape[:-1], width)


def gated_rounded(x: torch.Tensor, numbers: Numbers) -> Rounded:
    """Return `gated(x)` rounded per token; the product itself is not stored."""
    rows = _rows(x)
    count, width = rows.shape[0], rows.shape[1] // 2
    values, scale = _empty(numbers, count, width, rows)
    if count:
        with launching_on(rows):
            _gated[(count,)](rows, rows, values, scale, rows.stride(0), width, ROUNDS=_ROUNDS[numbers], **_block(width))
    return Rounded(numbers, values, scale)
