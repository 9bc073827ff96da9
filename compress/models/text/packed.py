"""Packed batches: the ids of several texts end to end, without padding. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from compress.models.text.tokens import Ids


@dataclass(frozen=True)
class PackedBatch:
    """Texts end to end. A text without tokens takes up one row, which is not pooled, so that every text has a row."""

    ids: Ids
    """Token ids, int64 [rows]."""
    positions: Ids
    """Position of each row in its own text, from 0, int64 [rows]."""
    offsets: npt.NDArray[np.int32]
    """Row at which each text begins, and the number of rows at the end, int32 [texts + 1]."""
    lengths: Ids
    """Tokens of each text, int64 [texts]; 0 for a text without tokens."""

    @property
    def longest(self) -> int:
        """Rows of the longest text."""
        return int(np.diff(self.offsets).max())


def pack(rows: Sequence[Ids]) -> PackedBatch:
    """Put the ids of texts, int64 [length] each, end to end. The one row of a text without tokens has the id 0."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    taken = np.maximum(lengths, 1)
    offsets = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum(taken, out=offsets[1:])
    ids = np.concatenate([row if len(row) else np.zeros(1, dtype=np.int64) for row in rows])
    positions = np.arange(len(ids), dtype=np.int64) - np.repeat(offsets[:-1].astype(np.int64), taken)
    return PackedBatch(ids, positions, offsets, lengths)


def consecutive(lengths: Sequence[int], batch_tokens: int) -> Iterator[slice]:
    """Yield slices of `lengths`, in order, each of at most `batch_tokens` tokens; a longer text is a batch of its own.

    Texts are not sorted: without padding, which texts share a batch does not change the work.
    """
    start, held = 0, 0
    for index, length in enumerate(lengths):
        length = max(1, length)
        if held and held + length > batch_tokens:
            yield slice(start, index)
            start, held = index, 0
        held += length
    if held:
        yield slice(start, len(lengths))
