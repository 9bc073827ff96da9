"""What retrieval loses when its documents' vectors are stored in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.statistics import Interval
from compress.measure.vectors.codec import VectorCodec, VectorFormat
from compress.models.embedder import Vectors

MILLION = 1_000_000


class VectorFormatRow(BaseModel):
    """One way of storing vectors, and what retrieval scores with it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    dimensions: int
    bytes_per_million: int
    """Of the documents' vectors."""
    scores: dict[str, float]
    """By task."""
    intervals: dict[str, Interval]
    """Of the difference from the same model's own float32 vectors, by task."""


class CompressedIndex:
    """An index as mteb's search takes it: documents stored by a codec."""

    def __init__(self, codec: VectorCodec) -> None:
        self._codec = codec
        self._stored: list[Any] = []

    def add_documents(self, embeddings: Any, idxs: Sequence[str]) -> None:
        """Store documents."""
        del idxs
        self._stored.append(self._codec.encode(np.asarray(embeddings, dtype=np.float32)))

    def search(
        self, embeddings: Any, top_k: int, similarity_fn: Callable[..., Any], top_ranked: Any = None, query_idx_to_id: Any = None
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Search all documents; reranking a given few is not what an index is for."""
        del similarity_fn, query_idx_to_id
        if top_ranked is not None:
            raise ValueError("a compressed index searches; it does not rerank")
        scores, found = self._codec.search(np.asarray(embeddings, dtype=np.float32), np.concatenate(self._stored), top_k)
        return scores.tolist(), found.tolist()

    def clear(self) -> None:
        """Forget the documents."""
        self._stored = []


def score_vector_formats(
    formats: Sequence[VectorFormat],
    calibration: Vectors,
    whole: dict[str, TaskScore],
    score: Callable[[str, CompressedIndex], TaskScore],
    *,
    margin: float,
    seed: int = 0,
) -> list[VectorFormatRow]:
    """Score ways of storing vectors.

    Args:
        formats: the ways.
        calibration: the model's vectors of calibration texts, float32 [texts, dimension].
        whole: scores of the retrieval tasks with the vectors as they are, by task.
        score: scores a task, by its name, with an index.
        margin: loss that is accepted, as a share of the whole's score.
        seed: of the bootstrap.
    """
    from compress.measure.accuracy.paired import compare_scores

    rows = []
    dimension = calibration.shape[1]
    for format in formats:
        codec = VectorCodec(format, calibration)
        scored = {name: score(name, CompressedIndex(codec)) for name in whole}
        compared = compare_scores(whole, scored, margin, seed=seed)
        rows.append(
            VectorFormatRow(
                format=format.name,
                dimensions=format.dimensions or dimension,
                bytes_per_million=format.bytes_per_vector(dimension) * MILLION,
                scores={name: found.score for name, found in scored.items()},
                intervals={name: found for name, found in compared.tasks.items() if found is not None},
            )
        )
    return rows
