"""The worker that embeds parts of a corpus, and how their vectors are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from compress.common.errors import BadTextError, NotFiniteError, UserError, nearest
from compress.measure.vectors.codec import VectorCodec, VectorFormat
from compress.models.embedder import Embedder, TextEmbedder, Vectors
from compress.models.text.spec import TASKS
from compress.runtimes.encoding import EncodeOptions

Store = Literal["float32", "float16", "int8", "binary"]
STORES: tuple[Store, ...] = get_args(Store)
DTYPES: dict[Store, npt.DTypeLike] = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}
INT8_SHIFT = 128
"""What is subtracted from the codec's codes, 0 to 255."""
MOST_FAULTS = 64
"""Texts of a part that a model may fail at; more are a fault of the model."""
_HALF = 65_504.0


def check_store(name: str) -> Store:
    """Return a way of storing vectors.

    Raises:
        UserError: there is none of this name.
    """
    for store in STORES:
        if store == name:
            return store
    raise UserError(f"--vector-format {name}: not known", nearest(name, STORES))


@dataclass(frozen=True)
class Encoding:
    """How texts of a corpus become vectors. Pickled, and the same for all workers."""

    model: str
    options: EncodeOptions
    store: Store = "float32"
    truncate: bool = True
    """Whether texts that are longer than the model takes are cut; else they are rejected."""
    threads: int | None = None
    """Threads of a worker; None: what the library takes."""


@dataclass(frozen=True)
class Facts:
    """What is known once the model is open."""

    dimension: int
    prompt: str
    """The prompt before every text."""
    similarity: str
    low: Vectors | None = None
    """Of int8: the smallest value of each dimension, float32 [dimension]."""
    step: Vectors | None = None
    """Of int8: the distance between two codes of each dimension, float32 [dimension]."""
    threshold: Vectors | None = None
    """Of binary: from where on a dimension's bit is set, float32 [dimension]."""


@dataclass(frozen=True)
class Describe:
    """A unit that asks for the facts; `texts` are those that ranges and thresholds are fitted on."""

    texts: Sequence[str]


@dataclass(frozen=True)
class Texts:
    """A unit of texts to embed."""

    texts: list[str]
    facts: Facts


@dataclass(frozen=True)
class Stored:
    """What became of a unit of texts."""

    vectors: npt.NDArray[Any]
    """[kept, dimension], or [kept, ceil(dimension / 8)] of binary."""
    rejected: dict[int, str]
    """Texts that have no vector, by their number in the unit, and why."""


class Encoder:
    """A model that embeds units."""

    def __init__(self, how: Encoding) -> None:
        from compress.runtimes.loading import load

        self._how = how
        options = how.options
        self._embedder: Embedder = load(
            how.model, runtime=options.runtime, device=options.device, stream=options.stream, threads=how.threads
        )

    def __call__(self, unit: Describe | Texts) -> Facts | Stored:
        """Do a unit."""
        return self._facts(unit.texts) if isinstance(unit, Describe) else self._stored(unit)

    def _facts(self, texts: Sequence[str]) -> Facts:
        """Fit what the vector format needs.

        Raises:
            UserError: the model's vectors must keep their length, which int8 and binary do not.
        """
        embedder, store, options = self._embedder, self._how.store, self._how.options
        prompt = embedder.spec.prompt(options.prompt, options.task if options.task in TASKS else None)
        facts = Facts(embedder.dimension, prompt, embedder.spec.similarity)
        if store in ("float32", "float16"):
            return facts
        if embedder.spec.similarity != "cosine" and not embedder.spec.normalize:
            raise UserError(
                f"--vector-format {store}: stores vectors at unit length, and those of {embedder.name!r} are compared by "
                f"{embedder.spec.similarity}",
                "--vector-format float32 or float16",
            )
        codec = VectorCodec(VectorFormat.parse(store), self._encode(list(texts)))
        if store == "binary":
            return Facts(facts.dimension, prompt, facts.similarity, threshold=codec.threshold)
        low, step = codec.grid
        return Facts(facts.dimension, prompt, facts.similarity, low, step)

    def _stored(self, unit: Texts) -> Stored:
        rejected = self._too_long(unit.texts, unit.facts.prompt)
        kept = [index for index in range(len(unit.texts)) if index not in rejected]
        texts = [unit.texts[index] for index in kept] if rejected else unit.texts
        failed: dict[int, str] = {}
        vectors = self._encode_or_reject(texts, 0, failed)
        rejected |= {kept[index]: reason for index, reason in failed.items()}
        return Stored(as_stored(vectors, self._how.store, unit.facts), rejected)

    def _encode(self, texts: list[str]) -> Vectors:
        options = self._how.options
        return self._embedder.encode(texts, options.prompt, task=options.task, progress=False)

    def _encode_or_reject(self, texts: list[str], first: int, failed: dict[int, str]) -> Vectors:
        """Embed texts; where the model fails at one, embed halves of them, until it stands alone.

        Args:
            texts: the texts.
            first: number of the first one.
            failed: gets the numbers of texts that the model cannot take, and why.

        Returns:
            The vectors of all others, float32 [kept, dimension].

        Raises:
            UserError: it fails at many of them.
        """
        try:
            return self._encode(texts)
        except (BadTextError, NotFiniteError) as error:
            if len(texts) == 1:
                failed[first] = (
                    "the model gives no finite vector"
                    if isinstance(error, NotFiniteError)
                    else str(error).removeprefix("texts[0] ")
                )
                return np.empty((0, self._embedder.dimension), dtype=np.float32)
            if len(failed) >= MOST_FAULTS:
                raise UserError(f"model {self._embedder.name!r}: fails at many texts ({error})", error.hint) from error
        half = len(texts) // 2
        parts = [
            self._encode_or_reject(part, start, failed) for part, start in ((texts[:half], first), (texts[half:], first + half))
        ]
        return np.concatenate(parts)

    def _too_long(self, texts: list[str], prompt: str) -> dict[int, str]:
        """Return the texts that would be cut, if they are not to be.

        Raises:
            UserError: the model's tokenizer is not here.
        """
        if self._how.truncate:
            return {}
        route = getattr(self._embedder, "route", None)
        embedder = self._embedder if route is None else route(self._how.options.task)
        if not isinstance(embedder, TextEmbedder):
            raise UserError(f"--no-truncation: the tokens of {embedder.name!r} cannot be counted here", "leave out --no-truncation")
        limit = embedder.tokenizer.max_length
        lengths = embedder.tokenizer.lengths([prompt + text for text in texts])
        return {index: f"has {length} tokens, the model takes {limit}" for index, length in enumerate(lengths) if length > limit}


def make_encoder(how: Encoding) -> Encoder:
    """Make the worker that embeds units."""
    return Encoder(how)


def as_stored(vectors: Vectors, store: Store, facts: Facts) -> npt.NDArray[Any]:
    """Return vectors, float32 [n, dimension], as they are stored.

    Raises:
        UserError: a value is too large for float16.
    """
    if store == "float32":
        return np.ascontiguousarray(vectors, dtype=np.float32)
    if store == "float16":
        if vectors.size and float(np.abs(vectors).max()) > _HALF:
            raise UserError("--vector-format float16: a vector has a value beyond 65,504", "--vector-format float32")
        return vectors.astype(np.float16)
    codec = VectorCodec.fitted(
        VectorFormat.parse(store), facts.dimension, low=facts.low, step=facts.step, threshold=facts.threshold
    )
    codes = codec.encode(vectors)
    return (codes.astype(np.int16) - INT8_SHIFT).astype(np.int8) if store == "int8" else codes
