"""How close a variant's vectors are to the baseline's, text by text and in what they retrieve. Numpy alone."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.models.embedder import Vectors

NEIGHBOURS = 10


class Fidelity(BaseModel):
    """Agreement of two embedders' vectors on the same texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: int
    cosine_mean: float
    cosine_p1: float
    """First percentile: one text in a hundred is worse."""
    cosine_min: float
    overlap_at_10: float
    """Mean share of a text's ten nearest other texts that both embedders agree on."""


def unit(vectors: Vectors) -> Vectors:
    """Scale each row to unit length; a zero row stays zero."""
    scaled: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


def cosines(a: Vectors, b: Vectors) -> Vectors:
    """Return the cosine of each row of `a` with the same row of `b`: [n, d] twice to [n]."""
    rows: Vectors = np.einsum("nd,nd->n", unit(a), unit(b))
    return rows


def neighbours(vectors: Vectors, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    """Return the indices of each row's `count` nearest other rows by cosine, [n, count], in no order."""
    scaled = unit(vectors)
    similarity = scaled @ scaled.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, count - 1, axis=1)[:, :count]


def fidelity(baseline: Vectors, variant: Vectors) -> Fidelity:
    """Compare two embedders' vectors of the same texts, float32 [n, d] twice.

    Raises:
        ValueError: the shapes differ, or there are too few texts for ten neighbours.
    """
    if baseline.shape != variant.shape:
        raise ValueError(f"vectors of one shape are compared, got {baseline.shape} and {variant.shape}")
    if len(baseline) <= NEIGHBOURS:
        raise ValueError(f"at least {NEIGHBOURS + 1} texts are needed, got {len(baseline)}")
    agreement = cosines(baseline, variant)
    pairs = zip(neighbours(baseline, NEIGHBOURS), neighbours(variant, NEIGHBOURS), strict=True)
    shared = [len(np.intersect1d(ours, theirs)) / NEIGHBOURS for ours, theirs in pairs]
    return Fidelity(
        texts=len(baseline),
        cosine_mean=float(agreement.mean()),
        cosine_p1=float(np.percentile(agreement, 1)),
        cosine_min=float(agreement.min()),
        overlap_at_10=float(np.mean(shared)),
    )
