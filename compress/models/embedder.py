"""An Embedder is texts in, vectors out: the protocol, and the loop around every network that answers it. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Batch, Ids, TextTokenizer, batches_by_tokens, pad_batch

Vectors = npt.NDArray[np.float32]
Item = TypeVar("Item")

# Texts are taken from the iterable this many at a time: enough for sorting by length to pay, few enough to hold.
CHUNK_TEXTS = 16_384
# From this many texts on, a progress bar is shown where somebody is watching.
LONG_WORK_TEXTS = 2_000


@runtime_checkable
class Embedder(Protocol):
    """What measures and exports see of a model, however it was made."""

    name: str
    dimension: int
    spec: EmbedderSpec

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts: float32 [n, dimension], in their order; of unit norm where the model normalises."""
        ...


class BatchedEmbedder(ABC):
    """Sorts by length, batches by a token budget, restores the order; subclasses run the batches."""

    def __init__(self, name: str, spec: EmbedderSpec, tokenizer: TextTokenizer, dimension: int, batch_tokens: int) -> None:
        self.name = name
        self.spec = spec
        self.tokenizer = tokenizer
        self.dimension = dimension
        self.batch_tokens = batch_tokens

    @abstractmethod
    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches: yield float32 [texts, dimension] of each, in order.

        Args:
            batches: in the order in which they are to be run.
            pool_from: tokens before this position are not pooled.
            show: show progress.
        """

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts.

        Args:
            texts: any iterable of strings; a generator is consumed some 16,000 at a time.
            prompt: put before every text, as it stands. None: the model's default prompt, mostly none.
            batch_tokens: padded tokens a batch may hold; None: this embedder's own default.
            progress: show a progress bar; None: for long work, where standard error is a terminal.

        Returns:
            float32 [n, dimension], in the order of the texts; of unit norm where the model normalises.

        Raises:
            TypeError: `texts` is a single string, or holds something else than strings.
            ValueError: `batch_tokens` is not positive, or an unpooled prompt fills the model's whole length.
            FloatingPointError: a vector is not finite.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; put it in a list: encode([text])")
        budget = self.batch_tokens if batch_tokens is None else batch_tokens
        if budget < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {budget}")
        prompt = self.spec.default_prompt if prompt is None else prompt
        pool_from = self.tokenizer.prompt_length(prompt) if prompt and not self.spec.pool_prompt else 0

        if pool_from >= self.tokenizer.max_length:
            raise ValueError(
                f"the prompt's {pool_from} tokens leave nothing of {self.tokenizer.max_length} for a text to be pooled"
            )
        chunks: list[Vectors] = []
        for chunk, rows in self._tokenized(texts, prompt):
            vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
            order = list(batches_by_tokens([len(row) for row in rows], budget))
            batches = [pad_batch([rows[index] for index in batch]) for batch in order]
            show = len(rows) >= LONG_WORK_TEXTS if progress is None else progress
            for batch, made in zip(order, self.forward(batches, pool_from, show), strict=True):
                vectors[batch] = made
            if not np.isfinite(vectors).all():
                first = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                raise FloatingPointError(f"{self.name} gave a vector that is not finite, for {chunk[first][:80]!r}")
            chunks.append(vectors)
        return np.concatenate(chunks) if chunks else np.empty((0, self.dimension), dtype=np.float32)

    def _tokenized(self, texts: Iterable[str], prompt: str) -> Iterator[tuple[list[str], list[Ids]]]:
        """Yield texts, some at a time, and their ids; the next ones are tokenized while the caller computes with these."""
        chunks = checked_chunks(texts)
        chunk = next(chunks, None)
        if chunk is None:
            return
        rows = self._ids(chunk, prompt)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizing") as beside:  # starts no thread before it is given work
            while chunk is not None:
                following = next(chunks, None)
                ahead = None if following is None else beside.submit(self._ids, following, prompt)
                yield chunk, rows
                chunk, rows = following, [] if ahead is None else ahead.result()

    def _ids(self, texts: list[str], prompt: str) -> list[Ids]:
        return self.tokenizer([prompt + text for text in texts] if prompt else texts)


def checked_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Cut texts into lists of `CHUNK_TEXTS`.

    Raises:
        TypeError: one is not a string.
    """
    iterator, seen = iter(texts), 0
    while chunk := list(islice(iterator, CHUNK_TEXTS)):
        for offset, text in enumerate(chunk):
            if not isinstance(text, str):
                raise TypeError(f"texts[{seen + offset}] is {type(text).__name__}, not str")
        seen += len(chunk)
        yield chunk


def watched(items: Sequence[Item], what: str, show: bool) -> Iterator[Item]:
    """Pass items through, under a progress bar where asked for and a terminal watches."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, description=what)
