"""From losses of single choices to the loss of many choices together, and how far that can be trusted.

Changes of a unit vector by independent choices are nearly orthogonal to each other and to the vector, so their squares add up. A
vector v + d with d orthogonal to v has the cosine 1 / sqrt(1 + |d|^2) to v. With s = |d|^2 / 2, to first order 1 - cosine, the sum
of all s gives `1 - cosine = 1 - 1 / sqrt(1 + 2 s)`, which never exceeds 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


def tangent(loss: float) -> float:
    """Return s of a measured 1 - cosine; losses of 1 and more count as 0.99."""
    cosine = 1 - min(max(loss, 0.0), 0.99)
    return (1 / cosine**2 - 1) / 2


def cosine_loss(total: float) -> float:
    """Return 1 - cosine of a sum of s."""
    return 1 - 1 / float(np.sqrt(1 + 2 * max(total, 0.0)))


def predicted(scores: Mapping[str, Mapping[str, float]], chosen: Mapping[str, str], start: float = 0.0) -> float:
    """Return the predicted 1 - cosine of a choice for each group; `start`: s of what the scores were taken around."""
    return cosine_loss(start + sum(scores[group][choice] for group, choice in chosen.items()))


@dataclass(frozen=True)
class Agreement:
    """How predictions and measurements agree."""

    r2: float
    """Share of the measurements' variance that the predictions explain as they are, without a fit."""
    r2_fitted: float
    """The same after the best line through the origin."""
    slope: float
    """Slope of that line: measured over predicted."""
    rank: float
    """Rank correlation (Spearman)."""


def agreement(predictions: Sequence[float], measured: Sequence[float]) -> Agreement:
    """Compare predictions with measurements, at least two of each."""
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    slope = float(x @ y) / max(float(x @ x), 1e-300)
    spread = float(np.square(y - y.mean()).sum()) or 1e-300
    ranks = np.stack([np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (x, y)])
    rank = float(np.asarray(np.corrcoef(ranks))[0, 1]) if len(x) > 1 else 1.0
    r2, fitted = (1 - float(np.square(y - by * x).sum()) / spread for by in (1.0, slope))
    return Agreement(r2, fitted, slope, rank)
