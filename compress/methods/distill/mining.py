"""Hard negatives: for each text, others whose teacher vectors are close to its own."""

from __future__ import annotations

import numpy as np

from compress.models.embedder import Vectors

# Neighbours are searched among this many texts; a larger set is split into stretches that are searched separately.
STRETCH = 100_000
ROWS = 2_048


def neighbours(vectors: Vectors, count: int) -> np.ndarray:
    """Return the indices of each text's nearest others by cosine, int64 [texts, count], nearest first.

    Raises:
        ValueError: there are not more than `count` texts.
    """
    if len(vectors) <= count:
        raise ValueError(f"{len(vectors)} texts have no {count} neighbours each")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    stretches = np.array_split(np.arange(len(unit)), -(-len(unit) // STRETCH))
    found = np.empty((len(unit), count), dtype=np.int64)
    for stretch in stretches:
        near = unit[stretch]
        for start in range(0, len(stretch), ROWS):
            rows = stretch[start : start + ROWS]
            similarities = unit[rows] @ near.T
            similarities[np.arange(len(rows)), rows - stretch[0]] = -np.inf
            best = np.argpartition(-similarities, count - 1, axis=1)[:, :count]
            order = np.argsort(-np.take_along_axis(similarities, best, axis=1), axis=1, kind="stable")
            found[rows] = stretch[0] + np.take_along_axis(best, order, axis=1)
    return found
