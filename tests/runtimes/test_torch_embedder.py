"""Texts in, vectors out: the same vectors as sentence-transformers, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

import compress
from compress.models.network.pooling import TextHead, TokenPooling
from compress.models.text.spec import Pooling


def reference(folder: Path, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(texts, prompt=prompt, batch_size=32, show_progress_bar=False)


def test_minilm_gives_the_vectors_of_sentence_transformers(minilm: Path, mixed_texts: list[str]) -> None:
    texts = mixed_texts[:90]  # of every kind, and a few of each length
    ours = compress.load("minilm", dtype="float32", device="cpu").encode(texts)
    assert ours.shape == (90, 384)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, reference(minilm, texts), atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "mistral"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "lasttoken"])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_pooling_of_encoders_and_decoders(
    make_model, mixed_texts: list[str], kind: str, pooling: str, normalize: bool
) -> None:
    folder = make_model(kind, pooling, normalize)
    texts = mixed_texts[:80]
    np.testing.assert_allclose(compress.load(str(folder), device="cpu").encode(texts), reference(folder, texts), atol=1e-5)


@pytest.mark.parametrize("include_prompt", [True, False])
def test_prompts_are_put_before_and_pooled_or_not(make_model, include_prompt: bool) -> None:
    folder = make_model("bert", prompts={"query": "find this: "}, include_prompt=include_prompt)
    embedder = compress.load(str(folder), device="cpu")
    texts = ["a parcel", "somewhat longer text about a parcel that is late"]
    assert embedder.spec.prompts == {"query": "find this: "}
    ours = embedder.encode(texts, embedder.spec.prompts["query"])
    np.testing.assert_allclose(ours, reference(folder, texts, "find this: "), atol=1e-5)
    assert np.abs(ours - embedder.encode(texts)).max() > 1e-2


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_batches_and_padding_change_nothing(make_model, mixed_texts: list[str], kind: str) -> None:
    embedder = compress.load(str(make_model(kind)), device="cpu")
    texts = mixed_texts[:60]
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    for batch_tokens in (1, 64, 100_000):
        np.testing.assert_allclose(embedder.encode(texts, batch_tokens=batch_tokens), alone, atol=1e-5)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    np.testing.assert_allclose(embedder.encode([texts[index] for index in shuffled]), alone[shuffled], atol=1e-5)


def test_any_iterable_and_nothing_at_all(bert: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    listed = embedder.encode(["one", "two"])
    np.testing.assert_array_equal(embedder.encode(text for text in ("one", "two")), listed)
    assert embedder.encode([]).shape == (0, 48)


def test_chunks_join_in_order(bert: Path, monkeypatch: pytest.MonkeyPatch, mixed_texts: list[str]) -> None:
    embedder = compress.load(str(bert), device="cpu")
    whole = embedder.encode(mixed_texts[:50])
    monkeypatch.setattr("compress.models.embedder.CHUNK_TEXTS", 7)
    np.testing.assert_allclose(embedder.encode(iter(mixed_texts[:50]), progress=True), whole, atol=1e-5)


def test_wrong_input_is_named(bert: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    with pytest.raises(TypeError, match="one string"):
        embedder.encode("text")
    with pytest.raises(TypeError, match=r"texts\[1\] is int"):
        embedder.encode(["text", 3])
    with pytest.raises(ValueError, match="batch_tokens"):
        embedder.encode(["text"], batch_tokens=0)


def test_a_vector_that_is_not_finite_is_an_error(bert: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    embedder.model.embeddings.LayerNorm.weight.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite, for 'text'"):
        embedder.encode(["text"])


def test_pooling_known_answers() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 4.0], [100.0, 100.0]]])
    tokens, after_prompt = torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]])
    for pooling, expected in ((Pooling.CLS, [1.0, 0.0]), (Pooling.MEAN, [2.0, 2.0]), (Pooling.LAST, [3.0, 4.0])):
        assert TextHead(TokenPooling([pooling]), normalize=False)(hidden, tokens, tokens).tolist() == [expected]
    for pooling, expected in ((Pooling.CLS, [3.0, 4.0]), (Pooling.MEAN, [3.0, 4.0]), (Pooling.LAST, [3.0, 4.0])):
        assert TextHead(TokenPooling([pooling]), normalize=False)(hidden, tokens, after_prompt).tolist() == [expected]
    unit = TextHead(TokenPooling([Pooling.LAST]), normalize=True)(hidden, tokens, tokens)
    np.testing.assert_allclose(unit.numpy(), [[0.6, 0.8]], rtol=1e-6)
