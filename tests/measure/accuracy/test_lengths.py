"""Scores by length: the buckets hold all queries and their mean is the task's score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import compress
from compress.measure.accuracy.lengths import by_length
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import find_tasks
from compress.models.source import find


def test_buckets_add_up_and_go_by_the_relevant_document(minilm: Path) -> None:
    task = find_tasks(["MiniRetrieval"], None)[0]
    tokenizer = find("minilm").tokenizer
    score = score_task(compress.load("minilm", device="cpu"), task)
    buckets = by_length(task, score, tokenizer, edges=(35, 45))
    assert [bucket.up_to for bucket in buckets] == [35, 45, None]
    assert sum(bucket.queries for bucket in buckets) == score.examples.count
    assert np.average([b.score for b in buckets], weights=[b.queries for b in buckets]) == pytest.approx(score.score, abs=1e-5)
    assert by_length(task, score, tokenizer)[0].queries == score.examples.count  # no document of the suite is long
    # What the model cuts off counts: lengths are of the whole text.
    assert tokenizer.lengths(["word " * 1000])[0] > tokenizer.max_length
    assert len(tokenizer(["word " * 1000])[0]) == tokenizer.max_length
