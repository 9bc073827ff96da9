"""A task's score is the model's, not the batch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import compress
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import EMBEDDED, find_tasks


class Shuffled:
    """The same embedder, given its texts in another order and in batches of another size."""

    def __init__(self, embedder: Any, batch_tokens: int) -> None:
        self._embedder, self._batch_tokens = embedder, batch_tokens
        self.name, self.spec, self.dimension = embedder.name, embedder.spec, embedder.dimension

    def encode(self, texts: Any, prompt: str | None = None, **_: Any) -> np.ndarray:
        order = np.random.default_rng(0).permutation(len(texts))
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        vectors[order] = self._embedder.encode([texts[index] for index in order], prompt, batch_tokens=self._batch_tokens)
        return vectors


@pytest.mark.slow  # that vectors do not change is in tests/runtimes/test_torch_embedder.py
@pytest.mark.parametrize("name", EMBEDDED)
def test_batches_order_and_padding_change_no_score(minilm: Path, name: str) -> None:
    embedder = compress.load("minilm", device="cpu", dtype="float32")
    task = find_tasks([name], None)[0]
    scores = [score_task(model, task).score for model in (embedder, Shuffled(embedder, 100), Shuffled(embedder, 8000))]
    assert np.ptp(scores) <= 1e-4  # 0.01 points
