"""The arithmetic of a static student: which tokens, from which vectors, with which factors. Training comes after; see `distill`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from compress.measure.vectors.codec import unit
from compress.models.embedder import Vectors
from compress.models.text.tokens import Ids

# Texts that are counted at a time, so that not all of their tokens are in memory at once.
COUNTED_TEXTS = 4_096


def counted(definition: Mapping[str, Any], texts: Sequence[str]) -> Ids:
    """Return how often each token of a `tokenizer.json` occurs in texts, int64 [tokens]."""
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    counts = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.int64)
    for start in range(0, len(texts), COUNTED_TEXTS):
        for encoding in tokenizer.encode_batch_fast(list(texts[start : start + COUNTED_TEXTS]), add_special_tokens=False):
            np.add.at(counts, np.asarray(encoding.ids, dtype=np.int64), 1)
    return counts


def frequent_words(definition: Mapping[str, Any], texts: Sequence[str], count: int) -> list[str]:
    """Return the most frequent words of texts that are no tokens of a `tokenizer.json`, the most frequent first.

    Words are what its own normalizer and pre-tokenizer make of a text; numbers and words that occur once are left out.

    Raises:
        ValueError: it is not a WordPiece tokenizer.
    """
    kind = definition["model"]["type"]
    if kind != "WordPiece":
        raise ValueError(f"`student.words` needs a WordPiece tokenizer, and the teacher's is {kind}; leave `words` out")
    tokenizer, known = Tokenizer.from_str(json.dumps(definition)), definition["model"]["vocab"]
    found: Counter[str] = Counter()
    for text in texts:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(normal) if tokenizer.pre_tokenizer else [(normal, None)]
        found.update(word for word, _ in pieces)
    new = ((word, times) for word, times in found.items() if times > 1 and word.isalpha() and word not in known)
    return [word for word, _ in sorted(new, key=lambda pair: (-pair[1], pair[0]))[:count]]


def with_words(definition: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the content of a WordPiece `tokenizer.json` with words added as tokens, numbered after all others.

    WordPiece takes the longest token that a word begins with, so a word that is a token is no longer split.
    """
    model, added = definition["model"], definition.get("added_tokens", [])
    first = 1 + max([*model["vocab"].values(), *(entry["id"] for entry in added)])
    more = {word: first + number for number, word in enumerate(words)}
    return {**definition, "model": {**model, "vocab": {**model["vocab"], **more}}}


def strings_of(tokenizer: Tokenizer) -> list[str]:
    """Return the text that each token stands for, in the order of their ids, for the teacher to embed."""
    prefix = getattr(tokenizer.model, "continuing_subword_prefix", None) or ""
    count = 1 + max(tokenizer.get_vocab().values())
    return [tokenizer.decode([number], skip_special_tokens=False).removeprefix(prefix).strip() for number in range(count)]


def sif_factors(counts: Ids, a: float) -> Vectors:
    """Return a factor for each token, float32 [tokens]: a / (a + p) with the token's share p of all tokens that were counted.

    Smooth inverse frequency (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings", equation 3). A
    frequent token says little of what a text is about; one that never occurs has the factor 1.
    """
    share = counts / max(1, int(counts.sum()))
    factors: Vectors = (a / (a + share)).astype(np.float32)
    return factors


def principal_axes(vectors: Vectors, width: int) -> Vectors:
    """Return the directions in which unit vectors spread most, the widest first: float32 [dimensions, width], orthonormal.

    For as many directions as there are dimensions, the dimensions themselves: the student then lies in the teacher's space.

    Nothing is centred: the first `width` coordinates are then those whose inner products, and so cosines, differ least from those
    of the whole vectors (Eckart and Young 1936). model2vec reduces a teacher in the same way, after centring.

    Args:
        vectors: float32 [texts, dimensions].
        width: number of directions.

    Raises:
        ValueError: there are fewer dimensions.
    """
    if width > vectors.shape[1]:
        raise ValueError(f"`student.width` is {width}, and the teacher's vectors have {vectors.shape[1]} dimensions")
    if width == vectors.shape[1]:
        return np.eye(width, dtype=np.float32)
    whole = unit(vectors).astype(np.float64)
    axes = np.linalg.eigh(whole.T @ whole)[1][:, ::-1][:, :width]
    # An eigenvector is known up to its sign; fixed here, so that a library's choice changes nothing.
    axes *= np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(width)])
    return np.ascontiguousarray(axes, dtype=np.float32)


def reduced(vectors: Vectors, axes: Vectors) -> Vectors:
    """Return unit vectors along axes, float32 [texts, axes], from vectors of any length, float32 [texts, dimensions]."""
    made: Vectors = unit(vectors) @ axes
    return made
