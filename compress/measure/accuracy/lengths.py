"""Retrieval scores by document length: does a model read long documents to the end?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.tasks import Task
from compress.models.text.tokens import TextTokenizer

# Upper bounds of the buckets, in tokens; one more bucket has no bound.
EDGES = (256, 512, 1_024, 4_096, 16_384)


class Bucket(BaseModel):
    """Queries whose relevant documents fall into one range of lengths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    up_to: int | None
    """Upper bound in tokens. None: longer than all other buckets."""
    queries: int
    score: float


def by_length(task: Task, score: TaskScore, tokenizer: TextTokenizer, edges: Sequence[int] = EDGES) -> list[Bucket]:
    """Split a retrieval task's score by the length of each query's longest relevant document, before truncation.

    Args:
        task: a retrieval task with its data loaded.
        score: what a model scored on it.
        tokenizer: the model's tokenizer.
        edges: upper bounds of the buckets, in tokens.
    """
    task_data = task.mteb.dataset
    values: list[float] = []
    lengths: list[int] = []
    parts = iter(score.examples.parts)
    for subset in task.mteb.hf_subsets:
        for split in task.mteb.eval_splits:
            data = task_data[subset][split]
            texts = {row["id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in data["corpus"]}
            counted = dict(zip(texts, tokenizer.lengths(list(texts.values())), strict=True))
            relevant = data["relevant_docs"]
            for query, value in zip(sorted(relevant), next(parts).values[0], strict=True):
                values.append(value)
                lengths.append(max(counted[document] for document, grade in relevant[query].items() if grade > 0))
    bucket = np.searchsorted(edges, lengths)
    ends = [*edges, None]
    return [
        Bucket(up_to=ends[index], queries=int((bucket == index).sum()), score=float(np.array(values)[bucket == index].mean()))
        for index in np.unique(bucket)
    ]
