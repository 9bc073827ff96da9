"""A served model: what it is, how its texts become tokens, and the processes that compute for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.common.errors import BadTextError, UserError
from compress.export.card import record_of
from compress.models.embedder import Vectors, check_lengths, first_pooled
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Ids
from compress.reports.compare import line_of
from compress.serve.instance import Instance, Watcher
from compress.serve.prompts import Prompts, Purpose
from compress.serve.protocol import ApiError, EmbeddingsRequest, texts_or_ids
from compress.serve.scheduling import Job, Lane, Scheduler
from compress.serve.settings import RuntimeOptions, ServeOptions

MATRYOSHKA: Mapping[str, tuple[int, ...]] = {
    "jinaai/jina-embeddings-v3": (32, 64, 128, 256, 512, 768, 1024),
    "google/embeddinggemma-300m": (128, 256, 512, 768),
    "Qwen/Qwen3-Embedding-0.6B": tuple(range(32, 1025)),
    "Qwen/Qwen3-Embedding-4B": tuple(range(32, 2561)),
    "Qwen/Qwen3-Embedding-8B": tuple(range(32, 4097)),
}
"""Models that were trained so that the beginning of a vector is one too, and the lengths that their cards name."""
SHOWN_DIMENSIONS = 16


@dataclass(frozen=True)
class Tokenized:
    """A request's texts as tokens."""

    rows: list[Ids]
    """The ids of each text, int64 [length]."""
    lane: Lane
    prompt: str | None
    """Name of the prompt, for logs."""

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return sum(map(len, self.rows))


class ServedModel:
    """A model, its queue and its processes."""

    def __init__(self, name: str, folder: ModelFolder, options: ServeOptions, watcher: Watcher) -> None:
        """Read a model's files; nothing is opened yet.

        Args:
            name: the name that clients give.
            folder: the model.
            options: how it is served.
            watcher: is told what its processes do.

        Raises:
            UserError: its files cannot be read, or it has no prompt of the default's name.
        """
        self.name, self.folder, self.limits = name, folder, options.limits
        self.prompts = Prompts(folder, options.prompt, options.template)
        first = self.prompts.ways[0].folder
        self.spec, self.dimension = first.spec, first.dimension
        self.widths = self._widths(options.dimensions)
        self.fingerprint = folder.fingerprint
        self.started = int(time.time())
        self._kept = self._kept_by_record()
        self.scheduler = Scheduler(options.limits.waiting_tokens, options.limits.wait_seconds)
        self.scheduler.instances = options.opened.instances
        self.instances = [
            Instance(_config(folder, options.opened, number), self.scheduler, watcher) for number in range(options.opened.instances)
        ]

    def _widths(self, given: tuple[int, ...]) -> tuple[int, ...]:
        base = self.folder.variant.base if self.folder.variant else self.folder.name
        known = MATRYOSHKA.get(base, ()) if self.spec.dimensions is None else ()
        for width in given:
            if not 1 <= width <= self.dimension:
                raise UserError(f"--dimensions: model {self.name!r} has vectors of {self.dimension} dimensions, not {width}")
        return tuple(sorted({*given, *(width for width in known if width < self.dimension), self.dimension}))

    @property
    def ready(self) -> bool:
        """Whether a process takes texts."""
        return any(instance.ready.is_set() for instance in self.instances)

    def width(self, request: EmbeddingsRequest) -> int:
        """Return the number of dimensions that a request asks for.

        Raises:
            ApiError: 400, the model was not trained for so many.
        """
        asked = request.dimensions
        if asked is None or asked in self.widths:
            return asked or self.dimension
        shown = ", ".join(map(str, self.widths[-SHOWN_DIMENSIONS:]))
        said = f"dimensions: {self.name!r} gives vectors of {shown} dimensions, not {str(asked)[:20]}"
        if len(self.widths) == 1:
            said += "; it is not known to be trained for others, and cut vectors would be worse without a word"
        raise ApiError(400, said, param="dimensions", code="invalid_dimensions")

    def tokenized(self, request: EmbeddingsRequest, suffix: str | None) -> Tokenized:
        """Tokenize a request. Several threads may do so at the same time.

        Args:
            request: the request.
            suffix: the prompt's name after `@` in `model`.

        Raises:
            ApiError: 400, an item is not what it should be, or there are too many tokens.
        """
        texts, ids = texts_or_ids(request.input, self.limits.items)
        made = self._given_ids(request, suffix, ids) if ids else self._from_texts(texts, self.prompts.of(request, suffix), request)
        if made.tokens > self.limits.tokens:
            raise ApiError(
                400,
                f"input: {made.tokens:,} tokens; at most {self.limits.tokens:,} are taken in a request",
                param="input",
                code="max_tokens_per_request",
            )
        return made

    def _from_texts(self, texts: list[str], purpose: Purpose, request: EmbeddingsRequest) -> Tokenized:
        if request.tokenizer is not None:
            raise ApiError(400, "tokenizer is about token ids, and input holds texts", param="tokenizer")
        tokenizer = purpose.way.tokenizer
        try:
            pool_from = first_pooled(tokenizer, purpose.prompt)
            rows = tokenizer([purpose.prompt + text for text in texts] if purpose.prompt else texts)
            check_lengths(self.name, tokenizer, rows)
        except BadTextError as error:
            raise ApiError(400, f"input: {error.message}", param="input", code="invalid_input") from error
        return Tokenized(rows, (purpose.way.number, pool_from), purpose.name)

    def _given_ids(self, request: EmbeddingsRequest, suffix: str | None, lists: list[list[int]]) -> Tokenized:
        """Take token ids as they are, if they are of this model's tokenizer."""
        if request.tokenizer is None:
            raise ApiError(
                400,
                f"input holds token ids, and it is not said which tokenizer made them; {self.name!r} has its own, to which the ids "
                "of OpenAI's models are other words. Send texts: in langchain-openai, "
                "OpenAIEmbeddings(check_embedding_ctx_length=False). If the ids are this model's own, send "
                f"tokenizer={self.name!r} as well",
                param="input",
                code="token_ids_not_accepted",
            )
        if request.tokenizer not in (self.name, self.fingerprint):
            raise ApiError(400, f"tokenizer: {request.tokenizer[:80]!r} is not the one of {self.name!r}", param="tokenizer")
        if suffix is not None or (request.input_type, request.instruction, request.prompt) != (None, None, None):
            raise ApiError(400, "token ids are taken as they are, so nothing can be put before them", param="input")
        way = self.prompts.ways[0]
        longest = min(way.tokenizer.max_length, way.tokenizer.positions or way.tokenizer.max_length)
        known = way.folder.token_rows or way.tokenizer.vocabulary_size
        rows = [np.asarray(ids, dtype=np.int64) for ids in lists]
        for index, row in enumerate(rows):
            if len(row) > longest:
                raise ApiError(400, f"input: item {index} has {len(row):,} tokens; the model takes {longest:,}", param="input")
            if int(row.max()) >= known:
                raise ApiError(400, f"input: item {index} holds token {row.max()}; the model has {known:,}", param="input")
        return Tokenized(rows, (way.number, 0), None)

    def job(self, made: Tokenized) -> Job:
        """Return a request for the scheduler."""
        vectors: Vectors = np.empty((len(made.rows), self.dimension), dtype=np.float32)
        return Job(made.rows, made.lane, vectors, asyncio.get_running_loop().create_future())

    def cut(self, vectors: Vectors, width: int) -> Vectors:
        """Return the first `width` dimensions, scaled to unit length again if the model's vectors have it."""
        if width == vectors.shape[1]:
            return vectors
        part = vectors[:, :width]
        if not self.spec.normalize:
            return part
        scaled: Vectors = part / np.maximum(np.linalg.norm(part, axis=1, keepdims=True), np.float32(1e-12))
        return scaled

    def described(self) -> dict[str, Any]:
        """Return what `GET /v1/models` says of it."""
        tokenizer, variant = self.prompts.ways[0].tokenizer, self.folder.variant
        running = next((instance.described for instance in self.instances if instance.described), None)
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "compress",
            "dimension": self.dimension,
            "dimensions": list(self.widths),
            "max_input_tokens": min(tokenizer.max_length, tokenizer.positions or tokenizer.max_length),
            "similarity": self.spec.similarity,
            "normalized": self.spec.normalize,
            "prompts": dict(self.prompts.named),
            "input_types": self.prompts.names,
            "routed": self.folder.routes is not None,
            "default_input_type": self.prompts.default,
            "default_prompt": self.spec.prompt()
            if self.prompts.default is None
            else self.prompts.by_name(self.prompts.default).prompt,
            "instruction_template": self.prompts.template,
            "licence": self.folder.licence,
            "fingerprint": self.fingerprint,
            "made_from": variant.base if variant else None,
            "weights": variant.weights if variant else None,
            "activations": str(variant.activations) if variant else None,
            "runtime": running.runtime if running else None,
            "dtype": running.dtype if running else None,
            "kept": self._kept,
        }

    def _kept_by_record(self) -> dict[str, Any] | None:
        """Return what of the original's accuracy the variant kept, as its run measured it; None where nothing was measured."""
        record = record_of(self.folder.path) if self.folder.is_variant else None
        if record is None or record.retained is None:
            return None
        line = line_of(record)
        tasks = [task.task for task in record.tasks]
        return {"share": line.kept, "low": line.low, "high": line.high, "verdict": line.verdict, "tasks": tasks, "run": record.run}


def _config(folder: ModelFolder, opened: RuntimeOptions, number: int) -> dict[str, Any]:
    """Return what the process of an instance opens."""
    threads = opened.threads
    if threads is None and opened.instances > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // opened.instances)
    return {
        "name": folder.name,
        "path": str(folder.path),
        "runtime": opened.runtime,
        "device": opened.devices[number % len(opened.devices)] if opened.devices else None,
        "dtype": opened.dtype,
        "threads": threads,
    }


def tokenizing_threads() -> ThreadPoolExecutor:
    """Return the threads that tokenize. The tokenizer is Rust and computes without Python's lock."""
    return ThreadPoolExecutor(2, thread_name_prefix="tokenizing")
