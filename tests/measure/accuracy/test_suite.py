"""The embedded suite: large enough, honest about what it holds, and able to tell a good embedder from a poor one."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.data.texts import SUITE, mixed_texts, read_jsonl, suite_texts
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import EMBEDDED, find_tasks
from compress.models.text.spec import EmbedderSpec


class RandomVectors:
    """A text's vector is drawn from its hash: the same each time, and meaning nothing."""

    name, dimension, spec = "random", 384, EmbedderSpec()

    def encode(self, texts, prompt=None, *, batch_tokens=None, progress=None):
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).standard_normal(384) for seed in seeds]).astype(np.float32)


class BagOfWords(RandomVectors):
    """Words hashed to random directions, weighted by how rare they are in the suite."""

    name = "bag of words"

    def __init__(self) -> None:
        self._seen = Counter(word for text in suite_texts() for word in set(self._words(text)))

    @staticmethod
    def _words(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())

    def encode(self, texts, prompt=None, *, batch_tokens=None, progress=None):
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in self._words(text):
                weight = np.log(len(suite_texts()) / (1 + self._seen[word]))
                vectors[row] += weight * np.random.default_rng(zlib.crc32(word.encode())).standard_normal(self.dimension)
        return vectors + 1e-6


def test_sizes_and_ranges() -> None:
    pairs = read_jsonl(SUITE / "MiniSTS" / "test.jsonl", ("sentence1", "sentence2", "score"))
    assert len(pairs) >= 150
    assert min(Counter(min(4, int(pair["score"])) for pair in pairs)[unit] for unit in range(5)) >= 25
    corpus = read_jsonl(SUITE / "MiniRetrieval" / "corpus.jsonl", ("_id", "title", "text"))
    queries = read_jsonl(SUITE / "MiniRetrieval" / "queries.jsonl", ("_id", "text"))
    assert len(corpus) >= 150
    assert len(queries) >= 100
    assert len({row["text"] for row in corpus}) == len(corpus)
    train, test = (
        read_jsonl(SUITE / "MiniIntentClassification" / f"{split}.jsonl", ("text", "label")) for split in ("train", "test")
    )
    assert not {row["text"].lower() for row in train} & {row["text"].lower() for row in test}
    assert {row["label"] for row in train} == {row["label"] for row in test} == set(range(12))


# What ranking at random gets: the share of pairs that belong together, and the mean over the questions' short lists.
EXPECTED_OF_CHANCE = {"MiniPairClassification": 0.4, "MiniReranking": 0.284}


def test_sizes_of_the_later_tasks() -> None:
    messages = read_jsonl(SUITE / "MiniClustering" / "test.jsonl", ("sentences", "labels"))
    assert set(Counter(row["labels"] for row in messages).values()) == {30}
    assert len(messages) == 300 == len({row["sentences"].lower() for row in messages})
    pairs = read_jsonl(SUITE / "MiniPairClassification" / "test.jsonl", ("sentence1", "sentence2", "labels"))
    assert Counter(row["labels"] for row in pairs) == {0: 180, 1: 120}
    questions = read_jsonl(SUITE / "MiniReranking" / "test.jsonl", ("query", "positive", "negative"))
    assert len(questions) == 60
    assert all(len(row["positive"]) in (1, 2) and len(row["negative"]) == 9 for row in questions)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("MiniSTS", "MiniPairClassification") else pytest.mark.slow) for name in EMBEDDED],
)
def test_it_tells_a_good_embedder_from_words_and_words_from_chance(minilm: Path, name: str) -> None:
    task = find_tasks([name], None)[0]
    good, words, chance = (
        score_task(embedder, task).score for embedder in (compress.load("minilm", device="cpu"), BagOfWords(), RandomVectors())
    )
    assert good < 0.9, "saturated"
    assert good > words + 0.15
    assert words > chance + 0.05
    assert good > chance + (0.35 if name in EXPECTED_OF_CHANCE else 0.4)
    assert abs(chance - EXPECTED_OF_CHANCE.get(name, 0.0)) < (0.05 if name in EXPECTED_OF_CHANCE else 0.2)


def test_mixed_texts_are_mixed_and_reproducible() -> None:
    texts = mixed_texts(200, seed=1)
    assert texts == mixed_texts(200, seed=1) != mixed_texts(200, seed=2)
    words = sorted(len(text.split()) for text in texts)
    assert words[0] <= 4
    assert words[-1] > 150
    assert 15 < words[100] < 50
