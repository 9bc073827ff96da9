"""Scores an Embedder with the mteb package's own tasks and scorers; returns the task's main score."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from mteb.models.search_wrappers import SearchEncoderWrapper
from mteb.similarity_functions import cos_sim, dot_score, pairwise_cos_sim, pairwise_dot_score
from mteb.types import PromptType
from pydantic import BaseModel, ConfigDict
from tqdm.std import tqdm  # type: ignore[import-untyped]

from compress.common.errors import UserError
from compress.measure.accuracy.examples import Examples, catching
from compress.measure.accuracy.tasks import Task, load_data
from compress.models.embedder import Embedder, Vectors
from compress.models.text.spec import Similarity
from compress.runtimes.routed import Routed

Compare = Callable[[Any, Any], Any]


def _distance(order: int, pairwise: bool) -> Compare:
    """Return the negative distance of vectors, of each with each or in pairs; sentence-transformers compares them so."""

    def compare(a: Any, b: Any) -> Any:
        import torch

        first, second = (torch.as_tensor(vectors).float().reshape(-1, np.shape(vectors)[-1]) for vectors in (a, b))
        return -(first - second).norm(p=order, dim=-1) if pairwise else -torch.cdist(first, second, p=order)

    return compare


SIMILARITIES: Mapping[Similarity, tuple[Compare, Compare]] = {
    "cosine": (cos_sim, pairwise_cos_sim),
    "dot": (dot_score, pairwise_dot_score),
    "euclidean": (_distance(2, pairwise=False), _distance(2, pairwise=True)),
    "manhattan": (_distance(1, pairwise=False), _distance(1, pairwise=True)),
}
"""How a model's vectors are compared: of each with each, and in pairs."""


class TaskScore(BaseModel):
    """Score of one model on one task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    type: str
    metric: str
    score: float
    """Main score as mteb returns it, usually from 0 to 1."""
    prompts: dict[str, str]
    """Prompts that went before the texts, by role: `query`, `document`, or `text` if a task has no roles."""
    seconds: float
    data: str
    """Fingerprint of the data."""
    examples: Examples
    """The examples that the score is computed from."""
    mteb: dict[str, Any]
    """The result in mteb's own format."""


class MtebEncoder(AbsEncoder):  # type: ignore[misc]
    """An Embedder as mteb's tasks call it."""

    def __init__(
        self,
        embedder: Embedder,
        batch_tokens: int | None = None,
        prompts: Mapping[str, str] | None = None,
        documents: Embedder | None = None,
    ) -> None:
        """Wrap an embedder; `documents` embeds what is searched, with its own prompts (None: the same embedder)."""
        self.embedder = embedder
        self.documents = None if documents is None else MtebEncoder(documents, batch_tokens, prompts)
        self.batch_tokens = batch_tokens
        self.model_prompts = {**embedder.spec.prompts, **(prompts or {})} or None
        # mteb wants a name of the form owner/name; the results go into the record.
        self.mteb_model_meta = ModelMeta.create_empty({"name": f"compress/{embedder.name.replace('/', '--')}", "revision": "local"})
        self.prompts_used: dict[str, str] = {}

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **kwargs: Any
    ) -> Vectors:
        """Embed the texts of a data loader with the prompt for the task and role, if there is one: float32 [texts, dimension]."""
        if self.documents is not None and prompt_type == PromptType.document:
            vectors = self.documents.encode(
                inputs, task_metadata=task_metadata, hf_split=hf_split, hf_subset=hf_subset, prompt_type=prompt_type, **kwargs
            )
            self.prompts_used |= self.documents.prompts_used
            return vectors
        name = self.get_prompt_name(task_metadata, prompt_type)
        prompt = self.model_prompts[name] if name and self.model_prompts else self.embedder.spec.default_prompt
        self.prompts_used[prompt_type.value if prompt_type else "text"] = prompt
        texts = [text for batch in inputs for text in batch["text"]]
        # In some tasks mteb passes the same text many times; each is embedded once.
        unique = list(dict.fromkeys(texts))
        embedder = self.embedder
        if isinstance(embedder, Routed):
            embedder = embedder.route(prompt_type.value if prompt_type else None)
        vectors = embedder.encode(unique, prompt, batch_tokens=self.batch_tokens)
        row = {text: index for index, text in enumerate(unique)}
        return vectors[np.fromiter((row[text] for text in texts), dtype=np.intp, count=len(texts))]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare each vector with each, as the model's own settings say."""
        return SIMILARITIES[self.embedder.spec.similarity][0](embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Compare vectors in pairs, as the model's own settings say."""
        return SIMILARITIES[self.embedder.spec.similarity][1](embeddings1, embeddings2)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disable the progress bars of mteb's scorers, which have no option for it."""
    own = tqdm.__init__
    tqdm.__init__ = partialmethod(own, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = own


def score_task(
    embedder: Embedder,
    task: Task,
    batch_tokens: int | None = None,
    prompts: Mapping[str, str] | None = None,
    documents: Embedder | None = None,
    index: Any = None,
) -> TaskScore:
    """Score an embedder on a task.

    Args:
        embedder: embeds the texts.
        task: the task.
        batch_tokens: padded tokens that a batch may hold; None: the embedder's own default.
        prompts: replace the model's own prompts of the same name.
        documents: embeds the documents of retrieval instead of `embedder`, to search one model's index with another's queries.
        index: backend that stores and searches the documents of retrieval; None: mteb's exact search.

    Raises:
        UserError: the task's data is on the hub and cannot be loaded, see `load_data`; or it gives no score.
    """
    encoder = MtebEncoder(embedder, batch_tokens, prompts, documents)
    model = encoder if index is None else SearchEncoderWrapper(encoder, index_backend=index)
    start = time.perf_counter()
    with _without_bars():
        load_data(task)
    with catching(task.mteb) as caught, _without_bars(), tempfile.TemporaryDirectory() as folder:
        result = mteb.evaluate(
            model,
            task.mteb,
            cache=None,
            co2_tracker=False,
            overwrite_strategy="always",
            show_progress_bar=False,
            prediction_folder=folder,
        )
    scores = next(scores for scores in result.task_results if scores.task_name == task.name)
    if not math.isfinite(scores.get_score()):
        raise UserError(
            f"task {task.name!r}: {task.mteb.metadata.main_score} is {scores.get_score()}: its data, or the model's vectors, are "
            "all the same or not finite",
            f"leave out {task.name}, or look at its data",
        )
    return TaskScore(
        task=task.name,
        type=task.mteb.metadata.type,
        metric=task.mteb.metadata.main_score,
        score=float(scores.get_score()),
        prompts=encoder.prompts_used,
        seconds=time.perf_counter() - start,
        data=task.fingerprint,
        examples=caught.examples(),
        mteb=json.loads(scores.model_dump_json()),
    )
