"""A model as tasks see it. Vectors and scores are computed once, then read from disk until something that decides them changes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.common.cache import use
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.common.machine import gpu_name, machine, versions
from compress.measure.vectors.codec import VectorFormat
from compress.runtimes.stored_vectors import Described, Mapped, StoredEmbedder, VectorStore

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore
    from compress.measure.accuracy.tasks import Task
    from compress.measure.vectors.index import VectorFormatRow
    from compress.models.embedder import Embedder, Vectors


class Scored:
    """A model with a store of its vectors; its scores are stored too if they are kept longer than the run."""

    def __init__(
        self,
        source: Described,
        open_embedder: Callable[[], Embedder],
        key: str | Path,
        *,
        batch_tokens: int | None = None,
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            source: the model's name, spec and dimension.
            open_embedder: opens the model; called for the first text that is not in the store.
            key: a name for everything that decides the vectors (`baseline_key`), to keep vectors and scores in the cache; or a
                folder that keeps the vectors only.
            batch_tokens: padded tokens that a batch may hold.
            prompts: replace the model's own prompts of the same name.
        """
        folder = key if isinstance(key, Path) else use("vectors", key)
        self._scores = None if isinstance(key, Path) else Journal(use("scores", key), checked=True)
        self._prompts = dict(prompts or {})
        self.embedder = StoredEmbedder(source, open_embedder, VectorStore(folder), batch_tokens)

    def score(self, task: Task) -> TaskScore:
        """Score the model on a task, or read its earlier score on the same data with the same prompts."""
        from compress.measure.accuracy.score import TaskScore, score_task

        if self._scores is None:
            return score_task(self.embedder, task, None, self._prompts)
        similarity = self.embedder.spec.similarity
        compared = [] if similarity == "cosine" else [similarity]  # without it, keys are those of earlier versions
        decided = json.dumps([task.name, task.fingerprint, self._prompts, *compared], sort_keys=True)
        name = f"{task.name}-{hashlib.sha256(decided.encode()).hexdigest()[:8]}"
        if self._scores.has(name):
            try:
                return TaskScore(**self._scores.get(name))
            except ValidationError as error:
                print(
                    f"{self._scores.path(name)}: is damaged ({error.error_count()} faults); scored again",
                    file=sys.stderr,
                    flush=True,
                )
        score = score_task(self.embedder, task, None, self._prompts)
        self._scores.put(name, score.model_dump(mode="json"))
        return TaskScore(**self._scores.get(name))

    def score_on(self, task: Task, documents: Scored, rotation: Vectors | None = None) -> float:
        """Score a retrieval task with this model's queries, rotated if asked, on another model's documents."""
        from compress.measure.accuracy.score import score_task

        queries = self.embedder if rotation is None else Mapped(self.embedder, lambda vectors: vectors @ rotation)
        return score_task(queries, task, None, self._prompts, documents.embedder).score

    def queries_on(self, task: Task, documents: Scored) -> TaskScore:
        """Score a retrieval task with this model's queries on another model's documents, each with its own model's prompts."""
        from compress.measure.accuracy.score import score_task

        return score_task(self.embedder, task, None, self._prompts, documents.embedder)

    def vector_formats(
        self, formats: Sequence[VectorFormat], tasks: Sequence[Task], texts: Sequence[str], margin: float
    ) -> list[VectorFormatRow]:
        """Score retrieval with the documents' vectors stored in each format; formats are fitted on the vectors of `texts`.

        Raises:
            UserError: the model's similarity depends on the vectors' length, which no format keeps.
        """
        from compress.measure.accuracy.score import score_task
        from compress.measure.vectors.index import score_vector_formats

        spec = self.embedder.spec
        if spec.similarity != "cosine" and not spec.normalize:
            raise UserError(
                f"model {self.embedder.name!r}: vector formats store vectors at unit length, and its own are compared by "
                f"{spec.similarity}",
                "leave out the vector formats",
            )
        searched = {task.name: task for task in tasks if task.mteb.metadata.type == "Retrieval"}
        return score_vector_formats(
            formats,
            self.embedder.encode(texts),
            {name: self.score(task) for name, task in searched.items()},
            lambda name, index: score_task(self.embedder, searched[name], None, self._prompts, index=index),
            margin=margin,
        )


def baseline_key(fingerprint: str, dtype: str | None, device: str, batch_tokens: int | None, runtime: str = "torch") -> str:
    """Return a key for everything that decides a model's vectors: files, precision, batches, runtime, packages, machine."""
    decided = [fingerprint, dtype, device, batch_tokens, runtime, versions_and_machine(device)]
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def versions_and_machine(device: str) -> list[Any]:
    """Return the packages and the processor, on which the last digits of a number may depend."""
    here = machine(gpu_name(device))
    return [versions(), here.cpu, here.cores, here.gpu]
