"""What is asked of either side, what it answers, and how far two sides' answers agree. No torch here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from compress.models.embedder import Vectors

Cosines = npt.NDArray[np.float64]


class Facts(BaseModel):
    """What a side says of itself; None where it does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: str
    """What was opened: a folder in torch, an endpoint, ..."""
    prompts: dict[str, str] | None = None
    """Prompts by name, empty ones left out."""
    default_prompt: str | None = None
    pooling: str | None = None
    max_length: int | None = None
    """Longest input in tokens."""
    truncation_side: str | None = None
    """Where texts are cut: right or left."""
    attention: str | None = None
    """`causal` or `bidirectional`, as measured."""
    dtype: str | None = None
    """Of the arithmetic."""
    weights: str | None = None
    """Of a variant: what its weights are."""


@dataclass(frozen=True)
class Answers:
    """Vectors of texts."""

    vectors: Vectors
    """float32 [n, dimension]; rows of NaN where a text was refused."""
    refused: Mapping[int, str] = field(default_factory=dict)
    """Why, by the text's index."""

    @classmethod
    def of(cls, rows: Sequence[Sequence[float] | Vectors | None], refused: Mapping[int, str]) -> Answers:
        """Put rows together, None where a text was refused; at least one row is there."""
        width = len(next(row for row in rows if row is not None))
        vectors = np.full((len(rows), width), np.nan, dtype=np.float32)
        for index, row in enumerate(rows):
            if row is not None:
                vectors[index] = row
        return cls(vectors, refused)


class Side(ABC):
    """One of the two that are compared."""

    def __init__(self, name: str, prompts: Mapping[str, str] | None) -> None:
        self.name = name
        self.prompts = None if prompts is None else {key: text for key, text in prompts.items() if text}

    @abstractmethod
    def answer(self, texts: Sequence[str], prompt: str | None) -> Answers:
        """Encode texts; `prompt` is put before each as it stands, None is the side's own default.

        Raises:
            UserError: it cannot be asked, or refuses every text.
        """

    @abstractmethod
    def facts(self) -> Facts:
        """Return what the side says of itself, after it has answered."""


def agreement(a: Vectors, b: Vectors) -> Cosines:
    """Return the cosine of each row of `a` with that of `b`, float64 [n]: NaN where one is missing, 1 for two zero vectors."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(wide_a, axis=1) * np.linalg.norm(wide_b, axis=1)
    both_zero = (np.linalg.norm(wide_a, axis=1) == 0) & (np.linalg.norm(wide_b, axis=1) == 0)
    products = np.einsum("nd,nd->n", wide_a, wide_b)
    cosines: Cosines = np.where(norms == 0, both_zero.astype(np.float64), products / np.where(norms == 0, 1, norms))
    return cosines


def norms_of(vectors: Vectors) -> Cosines:
    """Return the norms of the rows that are there and not zero."""
    norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
    found: Cosines = norms[np.isfinite(norms) & (norms > 0)]
    return found


def values_fit(vectors: Vectors) -> str:
    """Name the narrowest dtype that holds every value exactly: float16, bfloat16 or float32."""
    values = np.ascontiguousarray(vectors[np.isfinite(vectors).all(axis=1)], dtype=np.float32)
    if (values.view(np.uint32) & 0xFFFF == 0).all():
        return "bfloat16"
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).astype(np.float32)
    return "float16" if np.array_equal(half, values) else "float32"


@dataclass(frozen=True)
class BothSides:
    """Both sides, and what they answered."""

    side: Side
    reference: Side
    answers: Answers
    expected: Answers
    prompts: list[str | None]
    """The prompts that each side was given; None: its default."""
    cosines: Cosines
    at_least: float
    """Lowest cosine that counts as the same."""
