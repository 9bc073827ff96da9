"""What retrieval loses when the documents' vectors are stored in fewer bytes."""

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
    """Retrieval scores with vectors stored in one format."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    dimensions: int
    bytes_per_million: int
    """Bytes that a million document vectors take."""
    scores: dict[str, float]
    """Scores by task."""
    intervals: dict[str, Interval]
    """Confidence intervals of the difference from the same model's float32 vectors, by task."""


class CompressedIndex:
    """An index backend for mteb's search that stores documents with a codec."""

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
        """Search all documents. Reranking a given few is refused: that does not need an index."""
        del similarity_fn, query_idx_to_id
        if top_ranked is not None:
            raise ValueError("a compressed index searches; it does not rerank")
        scores, found = self._codec.search(np.asarray(embeddings, dtype=np.float32), np.concatenate(self._stored), top_k)
        return scores.tolist(), found.tolist()

    def clear(self) -> None:
        """Remove all documents."""
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
    """Score vector formats on retrieval tasks.

    Args:
        formats: the formats.
        calibration: the model's vectors of calibration texts, float32 [texts, dimension].
        whole: scores with the unchanged vectors, by retrieval task.
        score: scores a task, given by name, with an index.
        margin: accepted loss, as a share of the score with the unchanged vectors.
        seed: seed of the bootstrap.
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
