"""The Embedder protocol (texts in, vectors out), and the batching loop that every network shares. No torch here."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from compress.common.errors import BadTextError, NotFiniteError, UserError
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Batch, Ids, TextTokenizer, batches_by_tokens, pad_batch

Vectors = npt.NDArray[np.float32]
Item = TypeVar("Item")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")

# Number of texts taken from the iterable at a time: enough that sorting by length pays, few enough to hold in memory.
CHUNK_TEXTS = 16_384
# Characters of a chunk, so that very long texts are not all in memory at the same time.
CHUNK_CHARACTERS = 64 * 10**6
# Number of texts from which a progress bar is shown by default, if standard error is a terminal.
LONG_WORK_TEXTS = 2_000


@runtime_checkable
class Embedder(Protocol):
    """A model as measurements and exports see it, no matter how it was made."""

    name: str
    """The model's name in records and messages."""
    dimension: int
    """Width of the vectors."""
    spec: EmbedderSpec
    """How the model takes texts."""

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts as float32 [n, dimension], in their order; see `TextEmbedder.encode`."""
        ...


class TextEmbedder(ABC):
    """An embedder that checks texts and tokenizes them in chunks. Subclasses turn tokens into vectors."""

    def __init__(self, name: str, spec: EmbedderSpec, tokenizer: TextTokenizer, dimension: int, batch_tokens: int) -> None:
        self.name = name
        self.spec = spec
        self.tokenizer = tokenizer
        self.dimension = dimension
        self.batch_tokens = batch_tokens

    @abstractmethod
    def embed(self, rows: Sequence[Ids], budget: int, pool_from: int, show: bool) -> Vectors:
        """Embed tokenized texts, float32 [texts, dimension], in their order.

        Args:
            rows: the ids of each text, int64 [length].
            budget: largest number of tokens to work on at a time.
            pool_from: position of the first pooled token; earlier ones are a prompt that is not pooled.
            show: whether to show progress.
        """

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts.

        Args:
            texts: any iterable of strings; a generator is consumed in chunks of 16,384.
            prompt: the string to put before every text, verbatim; None uses the task's prompt.
            task: `query` or `document`: what the texts are embedded for, which chooses their prompt and, of a model with a Router,
                their route; None uses the model's default prompt, which is usually empty. See `EmbedderSpec.prompt`.
            batch_tokens: largest number of padded tokens in a batch; None uses this embedder's default.
            progress: whether to show a progress bar; None shows one for 2,000 texts or more. It appears only on a terminal.

        Returns:
            float32 [n, dimension], in the order of the texts, with unit norm if the model normalises.

        Raises:
            TypeError: `texts` is a single string, or an item is not a string.
            ValueError: the task is not known, `batch_tokens` is not positive, a prompt that is not pooled takes up the whole length
                of the model, or a text has more tokens than the network has positions for.
            FloatingPointError: a vector is not finite.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; put it in a list: encode([text])")
        budget = self.batch_tokens if batch_tokens is None else batch_tokens
        if budget < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {budget}")
        prompt = self.spec.prompt(prompt, task)
        pool_from = first_pooled(self.tokenizer, prompt)
        chunks: list[Vectors] = []
        for chunk, rows in self._tokenized(texts, prompt):
            check_lengths(self.name, self.tokenizer, rows, sum(map(len, chunks)))
            vectors = self.embed(rows, budget, pool_from, len(rows) >= LONG_WORK_TEXTS if progress is None else progress)
            if not np.isfinite(vectors).all():
                first = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
                raise NotFiniteError(f"{self.name} gave a vector that is not finite, for {chunk[first][:80]!r}")
            chunks.append(vectors)
        return np.concatenate(chunks) if chunks else np.empty((0, self.dimension), dtype=np.float32)

    def _tokenized(self, texts: Iterable[str], prompt: str) -> Iterator[tuple[list[str], list[Ids]]]:
        """Yield the texts in chunks with their ids; the next chunk is tokenized while the caller computes with this one."""
        chunks = checked_chunks(texts)
        chunk = next(chunks, None)
        if chunk is None:
            return
        rows = self._ids(chunk, prompt)
        with ThreadPoolExecutor(1, thread_name_prefix="tokenizing") as worker:  # starts its thread on the first submit
            while chunk is not None:
                following = next(chunks, None)
                ahead = None if following is None else worker.submit(self._ids, following, prompt)
                yield chunk, rows
                chunk, rows = following, [] if ahead is None else ahead.result()

    def _ids(self, texts: list[str], prompt: str) -> list[Ids]:
        return self.tokenizer([prompt + text for text in texts] if prompt else texts)


class BatchedEmbedder(TextEmbedder):
    """An embedder that sorts texts by length, batches them by a token budget and restores their order.

    Subclasses run the batches.
    """

    @property
    def batching(self) -> str:
        """How texts share a batch: `padded` to one length or, by embedders that can, `packed` end to end."""
        return "padded"

    @abstractmethod
    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches and yield the vectors of each in order, float32 [texts, dimension].

        Args:
            batches: the batches, in the order to run them.
            pool_from: position of the first pooled token; earlier ones are a prompt that is not pooled.
            show: whether to show progress.
        """

    def embed(self, rows: Sequence[Ids], budget: int, pool_from: int, show: bool) -> Vectors:
        """Embed tokenized texts in padded batches of at most `budget` tokens; see `TextEmbedder.embed`."""
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        order = list(batches_by_tokens([len(row) for row in rows], budget))
        batches = [pad_batch([rows[index] for index in batch]) for batch in order]
        for batch, made in zip(order, self.forward(batches, pool_from, show), strict=True):
            self.check_width(made)
            vectors[batch] = made
        return vectors

    def check_width(self, made: Vectors) -> None:
        """Check that vectors [texts, width] are as wide as the model's settings say.

        Raises:
            UserError: they are not.
        """
        if made.shape[1] != self.dimension:
            raise UserError(f"{self.name}: its settings say {self.dimension} dimensions, its network gives {made.shape[1]}")


def first_pooled(tokenizer: TextTokenizer, prompt: str) -> int:
    """Return the position of the first token that is pooled: 0, or the one after a prompt that the model does not pool.

    Raises:
        BadTextError: the prompt takes up the whole length of the model.
    """
    pool_from = tokenizer.prompt_length(prompt) if prompt and not tokenizer.spec.pool_prompt else 0
    if pool_from >= tokenizer.max_length:
        raise BadTextError(f"the prompt's {pool_from} tokens leave nothing of {tokenizer.max_length} for a text to be pooled")
    return pool_from


def check_lengths(name: str, tokenizer: TextTokenizer, rows: Sequence[Ids], before: int = 0) -> None:
    """Check that a model's network has positions for every text.

    Args:
        name: the model's name.
        tokenizer: the model's tokenizer.
        rows: the ids of each text, int64 [length].
        before: number of texts before these, which errors count from.

    Raises:
        BadTextError: a text is longer, because the model's settings allow more tokens than its network has positions for.
    """
    limit = tokenizer.positions
    for index, row in enumerate(rows) if limit is not None else ():
        if len(row) > limit:  # type: ignore[operator]
            raise BadTextError(
                f"texts[{before + index}] has {len(row)} tokens; {name} has positions for {limit}, "
                f"although its settings allow {tokenizer.max_length}",
                "lower max_seq_length in the model's sentence_bert_config.json, or cut the text",
            )


def checked_chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Split texts into lists of at most `CHUNK_TEXTS`, fewer where they have over `CHUNK_CHARACTERS` characters.

    Raises:
        TypeError: an item is not a string, or holds half of a surrogate pair, which no encoding of texts has.
    """
    iterator, seen = iter(texts), 0
    while chunk := _chunk(iterator):
        for offset, text in enumerate(chunk):
            if not isinstance(text, str):
                raise TypeError(f"texts[{seen + offset}] is {type(text).__name__}, not str")
            if not text.isascii() and (found := _LONE_SURROGATE.search(text)):
                raise TypeError(f"texts[{seen + offset}] is no text: it holds half of a surrogate pair, {found.group(0)!r}")
        seen += len(chunk)
        yield chunk


def _chunk(texts: Iterator[str]) -> list[str]:
    """Take the texts of one chunk; whatever has no length is passed on to be refused."""
    chunk: list[str] = []
    characters = 0
    for text in islice(texts, CHUNK_TEXTS):
        chunk.append(text)
        characters += len(text) if isinstance(text, str) else 0
        if characters >= CHUNK_CHARACTERS:
            break
    return chunk


def with_progress(items: Sequence[Item], what: str, show: bool) -> Iterator[Item]:
    """Yield the items, with a progress bar labelled `what` if `show` is set and standard error is a terminal."""
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield from bar.track(items, description=what)
