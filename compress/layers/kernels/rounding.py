"""Casts that round to nearest, ties to even, in the compiler and in the interpreter alike.

The compiler's casts do. The interpreter's cut bfloat16 off and carry no E4M3 mantissa into the exponent, so there float32 values
are rounded to the narrow type's own values first. Casting these is exact everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def rint(x):
    """Round float32 to the nearest integer, for |x| below 2^22: adding 1.5 x 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _round_mantissa(x, DROPPED: tl.constexpr):
    """Round float32 to the nearest value whose last `DROPPED` bits of mantissa are zero; NaN stays."""
    bits = x.to(tl.int32, bitcast=True)
    half = (1 << (DROPPED - 1)) - 1
    rounded = ((bits + half + ((bits >> DROPPED) & 1)) & -(1 << DROPPED)).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, rounded)


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """Cast float32 to float32, float16 or bfloat16."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        x = _round_mantissa(x, 16)
    return x.to(DTYPE)


@triton.jit
def to_e4m3(x):
    """Cast float32 of at most 448 to E4M3."""
    if INTERPRETED:
        subnormal = rint(x * 512.0) / 512.0
        x = tl.where(tl.abs(x) < 0.015625, subnormal, _round_mantissa(x, 20))  # 3 of 23 bits of mantissa stay
    return x.to(tl.float8e4nv)


@triton.jit
def dot(a, b, sums):
    """Return `a b + sums`, floating point, with sums in float32; the interpreter multiplies no bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(a, b, sums, input_precision="ieee")
