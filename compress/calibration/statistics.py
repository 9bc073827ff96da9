"""Statistics of a layer's inputs, gathered a few rows at a time."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import torch

from compress.layers.float_layers import linear


class Statistic(Protocol):
    """Something that is gathered from rows, a few at a time."""

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        ...


S = TypeVar("S", bound=Statistic)


class Hessian:
    """The second moment of a layer's inputs, `sum_t c_t x_t x_t^T / sum_t c_t`: half of the Hessian of its squared output error."""

    # Rows are gathered up to this many, so that products are large; columns are multiplied in stretches, upper ones alone.
    ROWS, COLUMNS = 4_096, 2_048

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)
        self._count = 0.0
        self._rows: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        self._count += float(counts.sum())
        self._rows.append(rows.float() * counts.sqrt()[:, None])
        if sum(map(len, self._rows)) >= self.ROWS:
            self._flush()

    def mean(self) -> torch.Tensor:
        """Return the moment, float32 [width, width]; nothing can be added after that."""
        if self._rows:
            self._flush()
        for start in range(0, len(self._sum), self.COLUMNS):  # below the diagonal, where only whole stretches were multiplied
            stop = start + self.COLUMNS
            inner = self._sum[start:stop, start:stop].triu_()
            inner.add_(inner.triu(1).t())
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].t()
        return self._sum.div_(self._count)

    def _flush(self) -> None:
        columns = torch.cat(self._rows).t().contiguous()
        self._rows = []
        for start in range(0, len(columns), self.COLUMNS):
            stop = start + self.COLUMNS
            self._sum[start:stop, start:] += linear(columns[start:stop], columns[start:])


class Moments:
    """Of each channel of a layer's inputs the largest magnitude, the mean magnitude and the mean square; and some of the rows."""

    def __init__(self, width: int, device: torch.device, keep: int = 0) -> None:
        """`keep`: how many rows to keep, spread evenly over all that come."""
        self.largest = torch.zeros(width, device=device)
        self._magnitudes, self._squares = (torch.zeros(width, device=device, dtype=torch.float64) for _ in range(2))
        self._count = 0.0
        self._keep, self._stride, self._seen = keep, 1, 0
        self._kept: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        magnitudes = rows.float().abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=0))
        self._magnitudes += counts @ magnitudes
        self._squares += counts @ magnitudes.square_()
        self._count += float(counts.sum())
        if self._keep:
            self._kept += list(rows[-self._seen % self._stride :: self._stride].float().unbind())
            self._seen += len(rows)
            while len(self._kept) > 2 * self._keep:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """float32 [width]."""
        return (self._magnitudes / self._count).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """float32 [width]."""
        return (self._squares / self._count).float()

    def rows(self) -> torch.Tensor:
        """Return the kept rows, float32 [at most `keep` or a few more, width]."""
        step = max(1, len(self._kept) // self._keep)
        return torch.stack(self._kept[::step])


def relative_error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the sum over tokens of |made - exact|^2 / |exact|^2, [n, out] twice.

    Relative to each token's own size, because a norm follows sooner or later in which a token with huge values counts no more than
    another. Chosen by the plain sum, SmoothQuant's exponents for MiniLM served those few tokens: static int8 at a mean cosine of
    0.951, relative 0.997.
    """
    return float(((made - exact).square_().sum(dim=1) / exact.square().sum(dim=1).clamp_min(1e-12)).sum())


class Magnitudes:
    """How often a layer's inputs have which magnitude, for the range of a static scale."""

    BINS = 4_096

    def __init__(self, largest: float) -> None:
        """`largest`: magnitude where the last bin ends."""
        self.largest = max(largest, 1e-12)
        self._bins = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        magnitudes = rows.float().abs()
        bins = (magnitudes * (self.BINS / self.largest)).long().clamp_max_(self.BINS - 1)
        weights = counts.double()[:, None].expand_as(magnitudes)
        self._bins += torch.bincount(bins.flatten(), weights.flatten(), minlength=self.BINS).cpu()

    def percentile(self, percent: float) -> float:
        """Return the magnitude that `percent` of the values do not exceed."""
        reached = self._bins.cumsum(0) / self._bins.sum()
        place = int(torch.searchsorted(reached, percent / 100))
        return self.largest * min(place + 1, self.BINS) / self.BINS

    def least_error(self, levels: int = 127) -> float:
        """Return the magnitude at which a symmetric grid of so many positive levels should end for the least squared error."""
        middles = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (self.largest / self.BINS)
        best, least = self.largest, float("inf")
        for part in np.geomspace(0.02, 1.0, 120):
            end = self.largest * float(part)
            rounded = (middles / (end / levels)).round_().clamp_max_(levels) * (end / levels)
            error = float((self._bins * (rounded - middles) ** 2).sum())
            if error < least:
                best, least = end, error
        return best
