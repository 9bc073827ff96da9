"""Quantization grids of weights: integers of 2 to 8 bits, with a scale and a zero per output channel or group of inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

# Scale of an all-zero group, where any positive scale gives zeros: small, and still representable in half precision.
SMALLEST_SCALE = 1e-7
# Rows are processed this many elements at a time: on a CPU so that they stay in its cache between passes, elsewhere so that
# temporary tensors take some hundred MB at most.
CHUNK, LARGE_CHUNK = 2**18, 2**26
# The search tries this many ranges per group, from the full range down to this share of it.
SHRINK_TO, SHRINK_STEPS = 0.6, 17


@dataclass(frozen=True)
class Grid:
    """The values that the weights of a layer [out, in] may take: `(u - zero) * scale`, with unsigned integers u below 2^bits.

    The zero of a symmetric grid is always the middle, 2^(bits - 1); with 8 bits u = 0 is not used, so that negating a value never
    overflows. `group_size` inputs share a scale; None: all inputs of an output channel do. The last group is smaller where the
    number of inputs is not a multiple of the group size.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    scale: torch.Tensor
    """float32 [out, groups], rounded to the precision it is stored in: half precision where there are groups."""
    zero: torch.Tensor
    """float32 [out, groups], whole numbers."""

    @property
    def lowest(self) -> int:
        """Smallest u in use."""
        return 1 if self.symmetric and self.bits == 8 else 0

    @property
    def highest(self) -> int:
        """Largest u in use."""
        return int(2**self.bits) - 1

    def group_of(self, inputs: int, device: torch.device | None = None) -> torch.Tensor:
        """Return the group of each input channel, int64 [in]."""
        return torch.arange(inputs, device=device) // (self.group_size or inputs)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Round weights [out, in] of any floating dtype to the grid: return the integers u, uint8 [out, in]."""
        rounded = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        group = self.group_of(weight.shape[1], weight.device)
        for rows in row_chunks(weight):
            scale, zero = (_spread(x[rows], group) for x in (self.scale, self.zero))
            steps = weight[rows].float().div_(scale) if weight.dtype != torch.float32 else weight[rows] / scale
            rounded[rows] = steps.round_().add_(zero).clamp_(self.lowest, self.highest).to(torch.uint8)
        return rounded

    def values(self, integers: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weights that integers u [out, in] represent."""
        return dequantize(integers, self.scale, self.zero, self.group_size, dtype)

    def rows(self, rows: slice) -> Grid:
        """Return the grid of some output channels."""
        return replace(self, scale=self.scale[rows], zero=self.zero[rows])

    def steps(self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Round weights to the grid, in units of the scale, from the zero: float32, all of one shape."""
        return (weight / scale).round_().add_(zero).clamp_(self.lowest, self.highest).sub_(zero)

    def codes(self, steps: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        """Return the integers u, uint8, of what `steps` returned."""
        return (steps + zero).to(torch.uint8)


def row_chunks(weight: torch.Tensor) -> Iterator[slice]:
    """Split the rows of a matrix into chunks of about `CHUNK` elements, `LARGE_CHUNK` on a GPU."""
    step = max(1, (CHUNK if weight.device.type == "cpu" else LARGE_CHUNK) // max(1, weight.shape[1]))
    return (slice(start, start + step) for start in range(0, weight.shape[0], step))


def _spread(per_group: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """Expand values from groups to inputs: [rows, groups] to [rows, in], or [rows, 1] where there is one group."""
    return per_group if per_group.shape[1] == 1 else per_group[:, group]


def dequantize(
    integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_size: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return `(u - zero) * scale`: uint8 [out, in], [out, groups] twice, to `dtype` [out, in]; the arithmetic is in float32."""
    inputs = integers.shape[1]
    size = group_size or inputs
    values = torch.empty(integers.shape, dtype=dtype, device=integers.device)
    for rows in row_chunks(integers):
        if inputs % size == 0:
            grouped = integers[rows].float().view(-1, inputs // size, size)
            values[rows] = (grouped.sub_(zero[rows, :, None]).mul_(scale[rows, :, None])).flatten(1).to(dtype)
        else:
            group = torch.arange(inputs, device=integers.device) // size
            values[rows] = (integers[rows].float() - _spread(zero[rows], group)).mul_(_spread(scale[rows], group)).to(dtype)
    return values


def find_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = True,
    *,
    search: bool = False,
    importance: torch.Tensor | None = None,
) -> Grid:
    """Find the scales and zeros of a weight.

    Args:
        weight: [out, in], any floating dtype.
        bits: 2 to 8.
        group_size: inputs that share a scale; None: all of an output channel.
        symmetric: whether zero is the middle of the grid; otherwise it follows the group's smallest and largest weight, and is at
            least 1, because the GPTQ format stores the zero minus one.
        search: whether to shrink each group's range where that lowers the squared rounding error; its largest weights are clipped.
        importance: weight of each input's squared error, float32 [in]; None: all the same.

    Raises:
        ValueError: a scale does not fit into half precision.
    """
    outputs, inputs = weight.shape
    size = group_size or inputs
    groups = -(-inputs // size)
    scale = torch.empty(outputs, groups, device=weight.device)
    zero = torch.full((outputs, groups), float(2 ** (bits - 1)), device=weight.device)
    counts = torch.ones(inputs, device=weight.device) if importance is None else importance.float()
    counts = in_groups(counts[None], size)
    for rows in row_chunks(weight):
        grouped = in_groups(weight[rows].float(), size)
        low, high = grouped.amin(dim=2).clamp_max_(0), grouped.amax(dim=2).clamp_min_(0)
        found = span(low, high, bits, symmetric, group_size is not None)
        if search:
            found = _searched(grouped, low, high, bits, symmetric, group_size is not None, counts, found)
        scale[rows], zero[rows] = found
    if not torch.isfinite(scale).all():
        raise ValueError("a group's scale does not fit into half precision")
    return Grid(bits, group_size, symmetric, scale, zero)


def in_groups(x: torch.Tensor, size: int) -> torch.Tensor:
    """Reshape [rows, in] to [rows, groups, size], padded with zeros after the last input."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    return padded.view(len(x), -1, size)


def span(low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, half: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero of grids that span `low` <= 0 to `high` >= 0, float32 [out, groups]; `half`: in half precision.

    Gradients pass to the end that decides the scale; none pass the rounding of the zero.
    """
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        zero = torch.full_like(low, middle)
        scale = torch.maximum(-low, high) / (middle - 1)
    else:
        zero = (-low / ((high - low) / top).clamp_min(SMALLEST_SCALE)).round_().clamp_(1, top - 1)
        scale = torch.maximum(high / (top - zero), -low / zero)
    scale.clamp_min_(SMALLEST_SCALE)
    return (scale.half().float() if half else scale), zero


def _searched(
    grouped: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    bits: int,
    symmetric: bool,
    half: bool,
    counts: torch.Tensor,
    found: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero of the range with the least squared error, from the full range down to `SHRINK_TO` of it."""
    bottom, top = (1 if symmetric and bits == 8 else 0), 2**bits - 1
    best_scale, best_zero = found
    least = torch.full_like(low, torch.inf)
    for step in range(SHRINK_STEPS):
        part = 1 - (1 - SHRINK_TO) * step / (SHRINK_STEPS - 1)
        scale, zero = span(low * part, high * part, bits, symmetric, half)
        wide, middle = scale[:, :, None], zero[:, :, None]
        error = (grouped / wide).round_().add_(middle).clamp_(bottom, top).sub_(middle).mul_(wide).sub_(grouped)
        error = error.square_().mul_(counts).sum(dim=2)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero
