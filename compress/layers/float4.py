"""Grids of four-bit floating point (E2M1): MXFP4 and NVFP4, rounded and scaled as compressed-tensors' reference does."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compress.layers.grid import Grid, in_groups, row_chunks
from compress.layers.scheme import FLOAT4_GROUPS, Numbers

# E2M1: 1 bit of sign, 2 of exponent, 1 of mantissa; no infinity and no NaN (OCP Microscaling Formats 1.0, section 5.3.3).
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST, SIGN = VALUES[-1], 8
# A value in the middle of two goes to the one with an even mantissa: below from these, above from those.
DOWN, UP = (0.25, 1.25, 2.5, 5.0), (0.75, 1.75, 3.5)

E4M3 = torch.float8_e4m3fn
LARGEST_SCALE = float(torch.finfo(E4M3).max)
# The scale of a group of zeros, as in the reference: any would do.
SCALE_OF_ZEROS = 0.125
# E8M0: 8 bits of exponent, whose bias is 127 (section 5.4.1). E2M1's largest value has the exponent 2.
BIAS, LARGEST_EXPONENT = 127, 2


def to_codes(steps: torch.Tensor) -> torch.Tensor:
    """Round float32 of any shape to the nearest E2M1 values, the largest beyond them: return their bits, uint8."""
    size = steps.abs()
    down, up = (torch.tensor(ends, device=steps.device) for ends in (DOWN, UP))
    codes = torch.bucketize(size, down, out_int32=True).add_(torch.bucketize(size, up, out_int32=True, right=True))
    return codes.add_(SIGN * (steps < 0)).to(torch.uint8)


def of_codes(codes: torch.Tensor) -> torch.Tensor:
    """Return the values of E2M1's bits, uint8 of any shape, in float32."""
    return _values_of(codes.device)[codes.int()]


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Return the values of packed bits, two in a byte, the first in the lower half: uint8 [rows, n] to float32 [rows, 2 n]."""
    values = _values_of(packed.device)
    pairs = torch.stack((values.repeat(len(values)), values.repeat_interleave(len(values))), dim=1)
    return torch.nn.functional.embedding(packed.int(), pairs).flatten(1)


def _values_of(device: torch.device) -> torch.Tensor:
    """Return the value of each code, float32 [16]; the sign of minus zero is kept."""
    positive = torch.tensor(VALUES, device=device)
    return torch.cat((positive, -positive))


def decoded_scale(stored: torch.Tensor, whole: torch.Tensor | None) -> torch.Tensor:
    """Return the scales that stored ones stand for, float32 [out, groups].

    Args:
        stored: E8M0 as uint8 [out, groups] (MXFP4), or E4M3 [out, groups] (NVFP4).
        whole: of NVFP4, what all scales were multiplied by, float32 []; None for MXFP4.
    """
    if whole is not None:
        return stored.float() / whole
    # The bits of float32, whose exponent has the same bias; its smallest power of two has no exponent of its own.
    return torch.where(stored == 0, 1 << 22, stored.int() << 23).view(torch.float32)


@dataclass(frozen=True)
class Float4Grid:
    """The values that the weights of a layer [out, in] may take: E2M1 values times the scale of their group of inputs.

    It answers what `compress.layers.grid.Grid` answers, with E2M1's bits in the place of integers.
    """

    numbers: Numbers
    stored: torch.Tensor
    """Scales as they are stored, [out, groups]; see `decoded_scale`."""
    whole: torch.Tensor | None
    """Of NVFP4, what all scales were multiplied by, float32 []."""

    @property
    def group_size(self) -> int:
        """Number of inputs that share a scale; the last group may be smaller."""
        return FLOAT4_GROUPS[self.numbers]

    @property
    def scale(self) -> torch.Tensor:
        """Scales, float32 [out, groups]."""
        return decoded_scale(self.stored, self.whole)

    @property
    def zero(self) -> torch.Tensor:
        """What zero is stored as, in units of the scale: always 0; float32 [out, groups]."""
        return torch.zeros(self.stored.shape, device=self.stored.device)

    def group_of(self, inputs: int, device: torch.device | None = None) -> torch.Tensor:
        """Return the group of each input channel, int64 [in]."""
        return torch.arange(inputs, device=device) // self.group_size

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Round weights [out, in] of any floating dtype to the grid: return E2M1's bits, uint8 [out, in]."""
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        scale, inputs = self.scale, weight.shape[1]
        for rows in row_chunks(weight):
            steps = in_groups(weight[rows].float(), self.group_size) / scale[rows, :, None]
            codes[rows] = to_codes(steps).flatten(1)[:, :inputs]
        return codes

    def values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights that E2M1's bits [out, in] represent."""
        scale = self.scale[:, self.group_of(codes.shape[1], codes.device)]
        return of_codes(codes).mul_(scale).to(dtype)

    def rows(self, rows: slice) -> Float4Grid:
        """Return the grid of some output channels."""
        return replace(self, stored=self.stored[rows])

    def steps(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round weights to the grid, in units of the scale: float32, all of one shape."""
        return of_codes(to_codes(weight / scale))

    def codes(self, steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return E2M1's bits, uint8, of what `steps` returned."""
        return to_codes(steps)


AnyGrid = Grid | Float4Grid
"""A grid that weights are rounded to."""


def find_float4_grid(weight: torch.Tensor, numbers: Numbers) -> Float4Grid:
    """Find the scales of a weight, [out, in] of any floating dtype, from the largest magnitude of each group, in float32.

    MXFP4: the power of two of the largest magnitude, a quarter of it, because E2M1 reaches from 4 to 6; the next one where the
    magnitude is 7 / 4 of its power or more, which would be rounded to 8. NVFP4: a sixth of the magnitude in E4M3, after one scale
    for the whole weight has taken the largest of these to 448.
    """
    largest = torch.cat([in_groups(weight[rows].float(), FLOAT4_GROUPS[numbers]).abs().amax(dim=2) for rows in row_chunks(weight)])
    if numbers is Numbers.MXFP4:
        mantissa, exponent = torch.frexp(largest)  # mantissas from 1 / 2 to 1
        exponent = exponent - 1 + (mantissa >= 7 / 8)
        stored = (exponent - LARGEST_EXPONENT + BIAS).clamp_(0, 2 * BIAS)
        return Float4Grid(numbers, stored.masked_fill_(largest == 0, 0).to(torch.uint8), None)
    # As the reference, in this order: a quotient of the products would be rounded in other places.
    whole = LARGEST_SCALE * LARGEST / largest.amax().clamp_min_(torch.finfo(torch.float32).tiny)
    whole = torch.nan_to_num(whole, posinf=1.0)  # of zeros
    stored = (whole * (largest / LARGEST)).clamp_(max=LARGEST_SCALE).to(E4M3)
    return Float4Grid(numbers, torch.where(stored.float() == 0, SCALE_OF_ZEROS, stored.float()).to(E4M3), whole)
