"""What a student learns from: texts, their prompts, and the teacher's vectors, which are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from compress.common.cache import use
from compress.data.texts import read_texts, same_text
from compress.models.embedder import Vectors
from compress.models.folder import ModelFolder
from compress.runtimes.loading import open_source
from compress.runtimes.stored_vectors import StoredEmbedder, VectorStore


@dataclass(frozen=True)
class Lessons:
    """Texts, each with the prompt that the student sees before it and the one that the teacher sees."""

    texts: list[str]
    prompts: list[str]
    teacher_prompts: list[str]

    def part(self, chosen: np.ndarray) -> Lessons:
        """Return some of them, by their indices, int64 [n]."""
        return Lessons(*([column[index] for index in chosen] for column in (self.texts, self.prompts, self.teacher_prompts)))

    def first(self, count: int) -> Lessons:
        """Return the first ones, at most `count`."""
        return Lessons(self.texts[:count], self.prompts[:count], self.teacher_prompts[:count])


def different(source: str, evaluated: frozenset[str]) -> tuple[list[str], int]:
    """Read texts without duplicates and without those that the student will be scored on; also return the number of the latter."""
    texts = list(dict.fromkeys(text for text in read_texts(source) if text.strip()))
    left = [text for text in texts if same_text(text) not in evaluated]
    return left, len(texts) - len(left)


def lessons(
    texts: Sequence[str], count: int | None, prompts: Sequence[str], prompted: float, *, same_prompts: bool, seed: int
) -> Lessons:
    """Draw texts in an order that follows from the seed, and give some of them a prompt.

    Args:
        texts: the texts, without duplicates.
        count: number of texts to draw; None: all.
        prompts: prompts that are put before some of the texts, in turn.
        prompted: share of the texts that get one.
        same_prompts: whether the teacher gets the prompts too.
        seed: seed of the order and of which texts get a prompt.

    Raises:
        ValueError: there are fewer than `count` texts.
    """
    if count is not None and len(texts) < count:
        raise ValueError(f"{len(texts):,} different texts, {count:,} are needed; lower `count`, or leave it out")
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(texts))[:count]
    drawn = generator.random(len(chosen)) < prompted if prompts else np.zeros(len(chosen), dtype=bool)
    given = [prompts[number % len(prompts)] if with_one else "" for number, with_one in enumerate(drawn)]
    return Lessons([texts[index] for index in chosen], given, given if same_prompts else [""] * len(given))


class Teacher:
    """A teacher whose vectors are cached by its files' fingerprint, text and prompt, so that each is computed only once."""

    def __init__(self, source: ModelFolder, device: str, dtype: str | None = None) -> None:
        """`dtype`: the dtype that it computes in; None: bfloat16 if the processor multiplies it natively, else float32."""
        dtype = dtype or _dtype(device)
        key = f"teacher-{source.fingerprint}-{dtype}"
        self.source = source
        opened = partial(open_source, source, device=device, dtype=dtype)
        self.embedder = StoredEmbedder(source, opened, VectorStore(use("vectors", key)))

    def vectors(self, taught: Lessons, progress: bool | None = None) -> Vectors:
        """Return the teacher's vectors, float32 [texts, width]."""
        made = np.empty((len(taught.texts), self.embedder.dimension), dtype=np.float32)
        for prompt in dict.fromkeys(taught.teacher_prompts):
            rows = [number for number, given in enumerate(taught.teacher_prompts) if given == prompt]
            made[rows] = self.embedder.encode([taught.texts[row] for row in rows], prompt, progress=progress)
        return made


def _dtype(device: str) -> str:
    import torch

    from compress.layers.float_layers import has_onednn_linear

    return "bfloat16" if device != "cpu" or has_onednn_linear(torch.bfloat16) else "float32"
