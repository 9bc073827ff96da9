"""Statistics of a layer's inputs, gathered a few rows at a time."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import torch

from compress.layers.float_layers import linear


class InputStatistic(Protocol):
    """A statistic that is gathered from rows, a few at a time."""

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n]."""
        ...


S = TypeVar("S", bound=InputStatistic)


class PairStatistic(Protocol):
    """A statistic that is gathered from rows and from what the unchanged model has in their place."""

    def add(self, rows: torch.Tensor, counts: torch.Tensor, exact: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n], and the unchanged model's rows [n, width]."""
        ...


PS = TypeVar("PS", bound=PairStatistic)


class Hessian:
    """The second moment of a layer's inputs, `sum_t c_t x_t x_t^T / sum_t c_t`.

    It is half of the Hessian of the layer's squared output error (GPTQ: H = 2 X X^T), divided by the tokens' total weight.
    """

    # Rows are collected up to this many, so that products are large. Columns are multiplied in stretches, only above the diagonal.
    ROWS, COLUMNS = 4_096, 2_048

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)
        self._count = 0.0
        self._rows: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n]."""
        self._count += float(counts.sum())
        self._rows.append(rows.float() * counts.sqrt()[:, None])
        if sum(map(len, self._rows)) >= self.ROWS:
            self._flush()

    def mean(self) -> torch.Tensor:
        """Return the moment, float32 [width, width]. No rows can be added after that."""
        if self._rows:
            self._flush()
        for start in range(0, len(self._sum), self.COLUMNS):  # fill in the part below the diagonal
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


class Drift:
    """The second moment of a layer's inputs x, and how they differ from those of the unchanged model, z, on average over tokens.

    The drift is `sum_t c_t (z_t - x_t) x_t^T / sum_t c_t`: the differences as far as the inputs explain them linearly.
    """

    ROWS = Hessian.ROWS

    def __init__(self, width: int, device: torch.device) -> None:
        self._hessian = Hessian(width, device)
        self._sum = torch.zeros(width, width, device=device)
        self._count = 0.0
        self._rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor, exact: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n], and the unchanged model's rows [n, width]."""
        self._hessian.add(rows, counts)
        self._count += float(counts.sum())
        given, wanted = rows.float(), exact.float()
        self._rows.append(((wanted - given) * counts[:, None], given))
        if sum(len(differences) for differences, _ in self._rows) >= self.ROWS:
            self._flush()

    def moment(self) -> torch.Tensor:
        """Return the second moment, as `Hessian.mean` does. No rows can be added after that."""
        return self._hessian.mean()

    def drift(self) -> torch.Tensor:
        """Return the drift, float32 [width, width]. No rows can be added after that."""
        if self._rows:
            self._flush()
        return self._sum.div_(self._count)

    def _flush(self) -> None:
        differences, given = (torch.cat(rows).t().contiguous() for rows in zip(*self._rows, strict=True))
        self._rows = []
        self._sum += linear(differences, given)


class Moments:
    """Largest magnitude, mean magnitude and mean square of each channel of a layer's inputs, and a sample of the rows."""

    def __init__(self, width: int, device: torch.device, keep: int = 0) -> None:
        """`keep`: number of rows to keep, spread evenly over all rows."""
        self.largest = torch.zeros(width, device=device)
        self._magnitudes, self._squares = (torch.zeros(width, device=device, dtype=torch.float64) for _ in range(2))
        self._count = 0.0
        self._keep, self._stride, self._seen = keep, 1, 0
        self._kept: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n]."""
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
        """Mean magnitude of each channel, float32 [width]."""
        return (self._magnitudes / self._count).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """Mean square of each channel, float32 [width]."""
        return (self._squares / self._count).float()

    def rows(self) -> torch.Tensor:
        """Return the kept rows, float32 [at most `keep` or a few more, width]."""
        step = max(1, len(self._kept) // self._keep)
        return torch.stack(self._kept[::step])


def relative_error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the sum over tokens of |made - exact|^2 / |exact|^2, for outputs [n, out].

    It is relative to each token's own size because sooner or later a norm follows, after which a token with huge values counts no
    more than others. Chosen by the plain sum, SmoothQuant's exponents for MiniLM fitted those few tokens: static int8 had a mean
    cosine of 0.951, instead of 0.997 with the relative sum.
    """
    return float(((made - exact).square_().sum(dim=1) / exact.square().sum(dim=1).clamp_min(1e-12)).sum())


class Magnitudes:
    """Histogram of the magnitudes of a layer's inputs, to choose the range of a static scale."""

    BINS = 4_096

    def __init__(self, largest: float) -> None:
        """`largest`: magnitude at which the last bin ends."""
        self.largest = max(largest, 1e-12)
        self._bins = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n]."""
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
        """Return the end of a symmetric grid with `levels` positive levels that has the smallest squared error."""
        middles = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (self.largest / self.BINS)
        best, least = self.largest, float("inf")
        for part in np.geomspace(0.02, 1.0, 120):
            end = self.largest * float(part)
            rounded = (middles / (end / levels)).round_().clamp_max_(levels) * (end / levels)
            error = float((self._bins * (rounded - middles) ** 2).sum())
            if error < least:
                best, least = end, error
        return best
