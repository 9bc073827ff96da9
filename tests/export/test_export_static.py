"""A static table for sentence-transformers, model2vec and graphs, read back, and the layouts that cannot hold one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from static_support import TEXTS, WIDTH, as_model2vec, model2vec_folder, shared_tensors, static_embedding_folder, table
from tests_support import compress_to
from tokenizers import Tokenizer

import compress
from compress.common.errors import UserError
from compress.export import FORMATS, export
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.vocabulary import Vocabulary
from compress.runtimes.contract import NUMPY
from compress.runtimes.exported import open_export

KNOWN = [text for text in TEXTS if text.isascii()]
"""Texts without unknown tokens."""


def vectors(variant: Path, texts: list[str]) -> np.ndarray:
    return compress.load(str(variant), runtime=NUMPY).encode(texts)


@pytest.mark.parametrize(
    ("step", "check"),
    [
        (Embeddings(bits=8), False),
        (Embeddings(bits=4, group_size=8), False),
        (None, False),
        pytest.param(Embeddings(bits=8), True, marks=pytest.mark.slow),  # in a process of its own, which takes seconds
    ],
    ids=["int8", "int4-g8", "float16", "int8, read back"],
)
def test_sentence_transformers_reads_the_variant_s_vectors(
    pieces: Tokenizer, tmp_path: Path, step: Embeddings | None, check: bool
) -> None:
    settings = {"prompts": {"query": "find: "}, "default_prompt_name": "query", "truncate_dim": 7}
    model = static_embedding_folder(tmp_path / "m", pieces, {"embedding.weight": table(pieces)}, "Normalize", **settings)
    compress_to(model, tmp_path / "v", *([step] if step else []))
    said: list[str] = []
    out = export(tmp_path / "v", "sentence-transformers", tmp_path / "out", said.append, check=check)
    assert said[-1].startswith("Read back with sentence-transformers " if check else "Not read back")
    theirs = SentenceTransformer(str(out), device="cpu")
    assert theirs.prompts["query"] == "find: "
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)
    np.testing.assert_allclose(compress.load(str(out)).encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)
    assert list(load_file(out / "model.safetensors")) == ["embedding.weight"]


def test_modules_after_the_mean_are_written_too(pieces: Tokenizer, tmp_path: Path) -> None:
    parts = [modules.StaticEmbedding(pieces, embedding_weights=table(pieces)), modules.Normalize()]
    parts += [modules.Dense(WIDTH, 10), modules.LayerNorm(10), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "m"))
    compress_to(tmp_path / "m", tmp_path / "v", Embeddings(bits=8))
    out = export(tmp_path / "v", "sentence-transformers", tmp_path / "out", check=False)
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)
    with pytest.raises(UserError, match="cannot be written as model2vec: it has a Normalize module after the mean"):
        export(tmp_path / "v", "model2vec", tmp_path / "other")


@pytest.mark.parametrize("normalize", [True, False])
def test_unknown_tokens_are_left_out_in_sentence_transformers_where_that_can_be_said(
    pieces: Tokenizer, tmp_path: Path, normalize: bool
) -> None:
    model = model2vec_folder(tmp_path / "m", pieces, shared_tensors(pieces), normalize=normalize)
    compress_to(model, tmp_path / "v", Embeddings(bits=8))
    said: list[str] = []
    out = export(tmp_path / "v", "sentence-transformers", tmp_path / "out", said.append, check=False)
    assert any("sentence-transformers only at 512 tokens" in line for line in said)
    assert any("Texts with an unknown token ([UNK])" in line for line in said) == (not normalize)
    theirs = SentenceTransformer(str(out), device="cpu")
    np.testing.assert_allclose(theirs.encode(KNOWN), vectors(tmp_path / "v", KNOWN), atol=1e-5)
    alike = np.allclose(theirs.encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)
    assert alike == normalize


def stated(folder: Path, texts: list[str]) -> np.ndarray:
    """What model2vec's semantics make of a folder, stated plainly."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tensors = load_file(folder / "model.safetensors")
    assert np.dtype(config["embedding_dtype"]) == tensors["embeddings"].dtype
    return as_model2vec(tokenizer, tensors, texts, config["normalize"], config["max_length"])


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "mapping and weights"])
@pytest.mark.parametrize(
    ("step", "dtype", "tolerance"),
    [(Embeddings(bits=8), "int8", 1e-5), (Embeddings(bits=4), "int8", 1e-5), (Embeddings(bits=4, group_size=8), "float16", 1e-3)],
    ids=["int8", "int4", "int4-g8"],
)
def test_model2vec_s_folder_holds_the_integers_and_scales(
    pieces: Tokenizer, tmp_path: Path, shared: bool, step: Embeddings, dtype: str, tolerance: float
) -> None:
    tensors = shared_tensors(pieces) if shared else {"embeddings": table(pieces)}
    model = model2vec_folder(tmp_path / "m", pieces, tensors, normalize=True)
    compress_to(model, tmp_path / "v", step)
    said: list[str] = []
    out = export(tmp_path / "v", "model2vec", tmp_path / "out", said.append, check=False)
    assert any("half precision" in line for line in said) == (dtype == "float16")
    texts = [*TEXTS, "evening " * 700]
    assert load_file(out / "model.safetensors")["embeddings"].dtype == dtype
    np.testing.assert_allclose(stated(out, texts), vectors(tmp_path / "v", texts), atol=tolerance)
    np.testing.assert_allclose(compress.load(str(out)).encode(texts), vectors(tmp_path / "v", texts), atol=tolerance)


def test_model2vec_reads_it_back(pieces: Tokenizer, tmp_path: Path) -> None:
    model2vec = pytest.importorskip("model2vec", reason="the extra `model2vec` is not installed")
    model = model2vec_folder(tmp_path / "m", pieces, {"embeddings": table(pieces)}, normalize=True)
    compress_to(model, tmp_path / "v", Embeddings(bits=8))
    said: list[str] = []
    out = export(tmp_path / "v", "model2vec", tmp_path / "out", said.append)
    assert said[-1].startswith("Read back with model2vec ")
    theirs = model2vec.StaticModel.from_pretrained(out)
    np.testing.assert_allclose(theirs.encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)


def test_what_model2vec_does_otherwise_is_said(pieces: Tokenizer, tmp_path: Path) -> None:
    rows = pieces.get_vocab_size() + 2  # more than the tokenizer has tokens for; model2vec wants as many
    model = static_embedding_folder(tmp_path / "m", pieces, {"embedding.weight": table(pieces, rows=rows)}, "Normalize")
    (tmp_path / "texts.txt").write_text("\n".join(KNOWN))
    compress_to(model, tmp_path / "v")
    said: list[str] = []
    out = export(tmp_path / "v", "model2vec", tmp_path / "out", said.append, check=False)
    assert any("([UNK]): model2vec leaves it out, the variant counts it" in line for line in said)
    assert len(load_file(out / "model.safetensors")["embeddings"]) == rows - 2
    np.testing.assert_allclose(stated(out, KNOWN), vectors(tmp_path / "v", KNOWN), atol=1e-3)
    small = model2vec_folder(tmp_path / "m2v", pieces, {"embeddings": table(pieces)})
    compress_to(small, tmp_path / "w", Vocabulary(texts=str(tmp_path / "texts.txt")))
    export(tmp_path / "w", "model2vec", tmp_path / "other", said.append, check=False)
    assert any("model2vec cuts them there, the variant does at" in line for line in said)


@pytest.mark.parametrize("format", ["onnx", pytest.param("openvino", marks=pytest.mark.slow)])
def test_graphs(pieces: Tokenizer, tmp_path: Path, format: str) -> None:
    pytest.importorskip("onnxruntime" if format == "onnx" else format, reason=f"{format} is not installed")
    model = static_embedding_folder(tmp_path / "m", pieces, {"embedding.weight": table(pieces)}, "Normalize")
    compress_to(model, tmp_path / "v", Embeddings(bits=8))
    out = export(tmp_path / "v", format, tmp_path / "out", check=False)
    np.testing.assert_allclose(open_export(out).encode(TEXTS), vectors(tmp_path / "v", TEXTS), atol=1e-5)
    other = model2vec_folder(tmp_path / "m2v", pieces, {"embeddings": table(pieces)})
    compress_to(other, tmp_path / "w")
    with pytest.raises(UserError, match="takes texts as model2vec does, which leaves unknown tokens out"):
        export(tmp_path / "w", format, tmp_path / "refused")


def test_layouts_of_networks_refuse_a_table_and_model2vec_a_network(pieces: Tokenizer, bert: Path, tmp_path: Path) -> None:
    model = static_embedding_folder(tmp_path / "m", pieces, {"embedding.weight": table(pieces)})
    compress_to(model, tmp_path / "v", Embeddings(bits=8))
    for format in FORMATS:
        if format in ("sentence-transformers", "model2vec", "onnx", "openvino"):
            continue
        with pytest.raises(UserError) as error:
            export(tmp_path / "v", format, tmp_path / format)
        assert "static table" in str(error.value) or format == "nv-embed", format
    compress_to(bert, tmp_path / "b")
    with pytest.raises(UserError, match="cannot be written as model2vec: it is not a static table"):
        export(tmp_path / "b", "model2vec", tmp_path / "other")
