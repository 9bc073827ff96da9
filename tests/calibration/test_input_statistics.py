"""Statistics against plain formulas."""

from __future__ import annotations

import pytest
import torch
from calibration_support import CPU

from compress.calibration.statistics import Hessian, Magnitudes, Moments


def test_statistics_are_the_plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, counts = torch.randn(301, 37, generator=generator), torch.rand(301, generator=generator)
    monkeypatch.setattr(Hessian, "ROWS", 64)
    monkeypatch.setattr(Hessian, "COLUMNS", 16)
    hessian, moments, magnitudes = Hessian(37, CPU), Moments(37, CPU, keep=20), Magnitudes(float(rows.abs().max()))
    for part in torch.arange(301).split(23):
        for statistic in (hessian, moments, magnitudes):
            statistic.add(rows[part], counts[part])
    weighed = rows.double() * counts[:, None].double()
    torch.testing.assert_close(hessian.mean().double(), weighed.t() @ rows.double() / counts.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.largest, rows.abs().amax(dim=0))
    torch.testing.assert_close(moments.mean_square, (weighed * rows).sum(dim=0).float() / counts.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.mean_magnitude, weighed.abs().sum(dim=0).float() / counts.sum(), rtol=1e-4, atol=1e-6)
    kept = moments.rows()
    assert 20 <= len(kept) <= 41
    places = [int((rows == row).all(dim=1).nonzero()) for row in kept]
    assert places == sorted(set(places))
    assert places[-1] > 250
    # The percentile of a weighted sample, to a bin's width.
    values, order = rows.abs().flatten().sort()
    share = counts[:, None].expand_as(rows).flatten()[order].cumsum(0) / (counts.sum() * 37)
    exact = float(values[int(torch.searchsorted(share, 0.99))])
    assert magnitudes.percentile(99) == pytest.approx(exact, abs=2 * magnitudes.largest / magnitudes.BINS)
    assert magnitudes.percentile(100) == pytest.approx(magnitudes.largest)


def test_the_range_of_least_error_clips_outliers_and_keeps_even_values() -> None:
    even, outlier = Magnitudes(1.0), Magnitudes(100.0)
    even.add(torch.linspace(-1, 1, 10_001)[:, None], torch.ones(10_001))
    assert even.least_error() > 0.98
    values = torch.cat([torch.linspace(-1, 1, 10_001), torch.tensor([100.0])])
    outlier.add(values[:, None], torch.ones(len(values)))
    assert outlier.least_error() == pytest.approx(100, rel=0.05)  # one in ten thousand, but of a hundred times the size
    rare = Magnitudes(4.0)
    rare.add(torch.cat([torch.randn(200_000).clamp(-1, 1) * 0.2, torch.tensor([4.0])])[:, None], torch.ones(200_001))
    assert rare.least_error() < 3
