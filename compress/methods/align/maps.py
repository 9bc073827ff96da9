"""Closed-form maps from one model's vectors to another's, fitted on the vectors of the same texts. Needs only numpy.

Both maps are affine. The vectors of many embedders lie around a common mean that is as long as they are, and a map without a shift
would spend itself on turning that mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from compress.measure.vectors.codec import unit
from compress.measure.vectors.fidelity import cosines
from compress.models.embedder import Vectors

MapName = Literal["rotation", "linear"]
PENALTIES = tuple(10.0**power for power in range(-6, 1))
"""Ridge penalties that are tried, as shares of the mean variance of a dimension."""
NEIGHBOURS = 10


@dataclass(frozen=True)
class AffineMap:
    """`vectors @ matrix + shift`."""

    name: MapName
    matrix: Vectors
    """float32 [from, to]."""
    shift: Vectors
    """float32 [to]."""
    penalty: float | None = None
    """The ridge penalty; None: the map has none."""

    def __call__(self, vectors: Vectors) -> Vectors:
        """Map vectors, float32 [n, from], to float32 [n, to]."""
        mapped: Vectors = vectors @ self.matrix + self.shift
        return mapped


@dataclass(frozen=True)
class HeldOut:
    """How well mapped vectors agree with the other model's on texts that the map was not fitted on."""

    cosine_mean: float
    """Mean cosine of a text's two vectors."""
    cosine_p1: float
    """First percentile of these cosines."""
    overlap_at_10: float
    """Shared part of a text's ten nearest other texts, all of them embedded by the other model: what a search would find."""


def rotation(source: Vectors, target: Vectors) -> AffineMap:
    """Fit a rotation with one scale and a shift: float32 [n, from] to float32 [n, to].

    Orthogonal Procrustes (Schoenemann 1966) under choice of a scale and a shift (Schoenemann and Carroll 1970). Where the widths
    differ, the matrix has orthonormal rows or columns: a rotation into, or out of, the wider space.
    """
    means, (ours, theirs) = _centred(source, target)
    # min |ours s R - theirs| over R'R = I: R = U V' of the singular value decomposition of ours' theirs.
    left, values, right = np.linalg.svd(ours.T @ theirs, full_matrices=False)
    turn = left @ right
    scale = values.sum() / max(np.square(ours @ turn).sum(), 1e-30)
    return _map("rotation", scale * turn, means)


def linear(source: Vectors, target: Vectors, penalty: float) -> AffineMap:
    """Fit a linear map with a shift by ridge least squares (Hoerl and Kennard 1970): float32 [n, from] to float32 [n, to].

    `penalty`: of the squared weights, as a share of the mean variance of a dimension of `source`.
    """
    means, (ours, theirs) = _centred(source, target)
    gram = ours.T @ ours
    added = penalty * max(np.trace(gram) / len(gram), 1e-30)
    return _map("linear", np.linalg.solve(gram + added * np.eye(len(gram)), ours.T @ theirs), means, penalty)


def held_out(mapped: Vectors, target: Vectors) -> HeldOut:
    """Compare mapped vectors with the other model's, float32 [n, to] each; n is larger than `NEIGHBOURS`."""
    agreement = cosines(target, mapped)
    index = unit(target)
    own = np.arange(len(index))
    shared = []
    for start in range(0, len(index), 1024):
        rows = own[start : start + 1024]
        found = [_nearest(queries[rows] @ index.T, rows) for queries in (index, unit(mapped))]
        shared += [len(np.intersect1d(one, other)) / NEIGHBOURS for one, other in zip(*found, strict=True)]
    return HeldOut(float(agreement.mean()), float(np.percentile(agreement, 1)), float(np.mean(shared)))


def fitted(
    name: Literal["auto", "rotation", "linear"], source: tuple[Vectors, Vectors], target: tuple[Vectors, Vectors]
) -> tuple[AffineMap, dict[str, HeldOut]]:
    """Fit maps, and choose the one whose vectors have the highest mean cosine on held-out texts.

    Args:
        name: the map, or `auto` for the better one.
        source: vectors of the texts to fit on, and of the held-out ones, float32 [n, from] each.
        target: the other model's vectors of the same texts, float32 [n, to] each.

    Returns:
        The chosen map; and for each kind of map how its best one does on the held-out texts.
    """
    maps = [rotation(source[0], target[0])] if name != "linear" else []
    if name != "rotation":
        maps += [linear(source[0], target[0], penalty) for penalty in PENALTIES]
    best: dict[str, tuple[AffineMap, float]] = {}
    for one in maps:
        agreed = float(cosines(target[1], one(source[1])).mean())
        if one.name not in best or agreed > best[one.name][1]:
            best[one.name] = (one, agreed)
    judged = {kind: held_out(one(source[1]), target[1]) for kind, (one, _) in best.items()}
    chosen, _ = max(best.values(), key=lambda pair: pair[1])
    return chosen, judged


def _centred(source: Vectors, target: Vectors) -> tuple[list[npt.NDArray[np.float64]], list[npt.NDArray[np.float64]]]:
    """Return the means of both, and both less their means, in float64."""
    both = [vectors.astype(np.float64) for vectors in (source, target)]
    means = [vectors.mean(axis=0) for vectors in both]
    return means, [vectors - mean for vectors, mean in zip(both, means, strict=True)]


def _map(
    name: MapName, matrix: npt.NDArray[np.float64], means: list[npt.NDArray[np.float64]], penalty: float | None = None
) -> AffineMap:
    shift = means[1] - means[0] @ matrix
    return AffineMap(name, matrix.astype(np.float32), shift.astype(np.float32), penalty)


def _nearest(similarity: Vectors, own: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Return the `NEIGHBOURS` nearest texts of each row other than its own, unordered: [rows, n] to [rows, 10]."""
    similarity[np.arange(len(own)), own] = -np.inf
    return np.argpartition(-similarity, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
