"""Static tables are read as their own library reads them: sentence-transformers or model2vec."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules
from static_support import (
    TEXTS,
    WIDTH,
    as_model2vec,
    model2vec_folder,
    shared_tensors,
    static_embedding_folder,
    table,
    write_json,
)
from tokenizers import Tokenizer

import compress
from compress.common.errors import UserError
from compress.models.folder import ModelFolder


def reference(folder: Path, texts: list[str], prompt: str | None = None) -> np.ndarray:
    return SentenceTransformer(str(folder), device="cpu").encode(texts, prompt=prompt)


def agree(folder: Path, expected: np.ndarray, texts: list[str] = TEXTS, prompt: str | None = None) -> None:
    """Check that numpy and torch give these vectors; numpy is what a checkpoint opens in."""
    for runtime in (None, "torch"):
        embedder = compress.load(str(folder), device="cpu", runtime=runtime)
        assert type(embedder).__name__ == ("NumpyEmbedder" if runtime is None else "TorchEmbedder")
        assert embedder.dimension == expected.shape[1]
        np.testing.assert_allclose(embedder.encode(texts, prompt), expected, atol=1e-5 * np.abs(expected).max())


def test_unknown_and_special_tokens_in_a_text_count_and_none_is_added(pieces: Tokenizer, tmp_path: Path) -> None:
    folder = static_embedding_folder(tmp_path / "st", pieces, {"embedding.weight": table(pieces)}, "Normalize")
    agree(folder, reference(folder, TEXTS))
    ids = compress.load(str(folder)).tokenizer(["日 [CLS] rain"])[0].tolist()
    assert pieces.token_to_id("[UNK]") in ids
    assert ids.count(pieces.token_to_id("[CLS]")) == 1
    assert not compress.load(str(folder)).encode([""]).any()


@pytest.mark.parametrize("direction", ["right", "left"])
def test_texts_are_cut_where_the_tokenizer_s_file_says(pieces: Tokenizer, tmp_path: Path, direction: str) -> None:
    pieces.enable_truncation(5, direction=direction)
    folder = static_embedding_folder(tmp_path / "st", pieces, {"embedding.weight": table(pieces)})
    agree(folder, reference(folder, TEXTS))


def test_a_folder_of_its_own_prompts_and_fewer_dimensions(pieces: Tokenizer, tmp_path: Path) -> None:
    settings = {"prompts": {"query": "find this: "}, "default_prompt_name": "query", "truncate_dim": 9}
    tensors = {"embedding.weight": table(pieces, rows=pieces.get_vocab_size() + 3)}
    folder = static_embedding_folder(tmp_path / "st", pieces, tensors, "Normalize", place="0_StaticEmbedding", **settings)
    agree(folder, reference(folder, TEXTS))
    agree(folder, reference(folder, TEXTS, prompt="other: "), prompt="other: ")
    assert compress.load(str(folder)).dimension == 9


def test_what_comes_after_the_mean(pieces: Tokenizer, tmp_path: Path) -> None:
    for number, activation in enumerate(
        [torch.nn.Tanh(), torch.nn.GELU(), torch.nn.Sigmoid(), torch.nn.ReLU(), torch.nn.Identity()]
    ):
        torch.manual_seed(number)
        parts = [
            modules.StaticEmbedding(pieces, embedding_weights=table(pieces)),
            modules.Normalize(),
            modules.Dense(WIDTH, 10, activation_function=activation, bias=number != 1),
            modules.LayerNorm(10),
        ]
        torch.nn.init.normal_(parts[3].norm.weight)
        SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / f"{number}"))
        agree(tmp_path / f"{number}", reference(tmp_path / f"{number}", TEXTS))


def test_an_activation_that_numpy_has_not_is_left_to_torch(pieces: Tokenizer, tmp_path: Path) -> None:
    parts = [
        modules.StaticEmbedding(pieces, embedding_weights=table(pieces)),
        modules.Dense(WIDTH, 10, activation_function=torch.nn.Softplus()),
    ]
    SentenceTransformer(modules=parts, device="cpu").save(str(tmp_path / "softplus"))
    with pytest.raises(UserError, match=r"numpy has no activation torch\.nn\.modules\.activation\.Softplus") as error:
        compress.load(str(tmp_path / "softplus"))
    assert error.value.hint == "runtime: torch"
    made = compress.load(str(tmp_path / "softplus"), runtime="torch", device="cpu").encode(TEXTS)
    np.testing.assert_allclose(made, reference(tmp_path / "softplus", TEXTS), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True], ids=["plain", "mapping and weights"])
def test_sentence_transformers_reads_model2vec_s_tensors(pieces: Tokenizer, tmp_path: Path, shared: bool) -> None:
    tensors = shared_tensors(pieces) if shared else {"embeddings": table(pieces)}
    folder = static_embedding_folder(tmp_path / "st", pieces, tensors, "Normalize", place=".")
    write_json(
        folder / "config.json", {"model_type": "model2vec", "normalize": True}
    )  # as model2vec writes it next to modules.json
    agree(folder, reference(folder, TEXTS))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["plain", "weights", "mapping", "mapping and weights", "int8", "float64"])
def test_model2vec_leaves_unknown_tokens_out_and_cuts_long_texts(
    pieces: Tokenizer, tmp_path: Path, kind: str, normalize: bool
) -> None:
    tensors = {"embeddings": table(pieces)}
    if kind in ("weights", "mapping", "mapping and weights"):
        shared = shared_tensors(pieces)
        tensors = {name: array for name, array in shared.items() if name == "embeddings" or name in kind}
        if "mapping" not in kind:
            tensors["embeddings"] = table(pieces)
    elif kind != "plain":
        tensors["embeddings"] = (100 * tensors["embeddings"]).clip(-127, 127).astype(kind)
    config = {"normalize": normalize, "max_length": 7} if kind == "weights" else {"normalize": normalize}
    folder = model2vec_folder(tmp_path / "m2v", pieces, tensors, **config)
    texts = [*TEXTS, "日本", "evening " * 600, "x" * 5_000]
    expected = as_model2vec(pieces, tensors, texts, normalize, config.get("max_length", 512))
    agree(folder, expected.astype(np.float32), texts)
    assert not expected[len(TEXTS)].any(), "nothing in it is known"


def test_model2vec_without_truncation(pieces: Tokenizer, tmp_path: Path) -> None:
    pieces.enable_truncation(3)  # which model2vec takes out
    folder = model2vec_folder(tmp_path / "m2v", pieces, {"embeddings": table(pieces)}, max_length=None)
    texts = ["evening rain " * 300]  # 1,800 tokens
    expected = as_model2vec(pieces, {"embeddings": table(pieces)}, texts, False, None)
    agree(folder, expected.astype(np.float32), texts)


def test_model2vec_s_own_package_agrees(pieces: Tokenizer, tmp_path: Path) -> None:
    model2vec = pytest.importorskip("model2vec", reason="the extra `model2vec` is not installed")
    texts = [*TEXTS, "evening " * 600, "x" * 5_000]
    for name, tensors in {"plain": {"embeddings": table(pieces)}, "shared": shared_tensors(pieces)}.items():
        folder = model2vec_folder(tmp_path / name, pieces, tensors, normalize=True)
        agree(folder, model2vec.StaticModel.from_pretrained(folder).encode(texts), texts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tables_in_half_precision_are_averaged_in_float32(pieces: Tokenizer, tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import save_file as save_torch

    half = torch.from_numpy(table(pieces)).to(getattr(torch, dtype))
    folder = static_embedding_folder(tmp_path / "st", pieces, {"embedding.weight": table(pieces)})
    save_file({"embedding.weight": half.float().numpy()}, folder / "model.safetensors")
    expected = reference(folder, TEXTS)
    save_torch({"embedding.weight": half}, folder / "model.safetensors")
    agree(folder, expected)


def broken(folder: Path, what: str) -> str:
    """Break a model2vec folder; returns what the error says."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if what == "mapping":
        tensors["mapping"][7] = 40
        said = "mapping: 7 has row 40 of a table of 40 rows"
    elif what == "weights":
        tensors["weights"] = tensors["weights"][:-1]
        said = r"weights: has \d+ entries for \d+ tokens"
    elif what == "unknown tensor":
        tensors["wieghts"] = tensors.pop("weights")
        said = "wieghts: not a tensor of a static table"
    elif what == "dimensions":
        tensors["embeddings"] = tensors["embeddings"][0]
        said = r"embeddings: has shape \[24\]"
    elif what == "dtype":
        tensors["mapping"] = tensors["mapping"].astype(np.float32)
        said = "mapping: is F32, not one of I32, I64"
    elif what == "tokens":
        tensors = {name: array[:-1] if name != "embeddings" else array for name, array in tensors.items()}
        said = r"tokenizer\.json: has a token of number \d+; the table has vectors for \d+ tokens"
    elif what == "table":
        del tensors["embeddings"]
        said = "no table of vectors"
    else:
        config = json.loads((folder / "config.json").read_text())
        write_json(folder / "config.json", {**config, "max_length": "long"})
        said = "max_length: must be a positive number or null, not 'long'"
    save_file(tensors, weights)
    return said


@pytest.mark.parametrize("what", ["mapping", "weights", "unknown tensor", "dimensions", "dtype", "tokens", "table", "max_length"])
def test_a_broken_folder_is_refused_with_its_place(pieces: Tokenizer, tmp_path: Path, what: str) -> None:
    folder = model2vec_folder(tmp_path / "m2v", pieces, shared_tensors(pieces))
    said = broken(folder, what)
    with pytest.raises(UserError, match=said):
        compress.load(str(folder))


@pytest.mark.parametrize(
    ("after", "said"),
    [("Pooling", "Pooling is not supported after StaticEmbedding"), ("StaticEmbedding", "as the first module only")],
)
def test_modules_that_a_table_cannot_have(pieces: Tokenizer, tmp_path: Path, after: str, said: str) -> None:
    folder = static_embedding_folder(tmp_path / "st", pieces, {"embedding.weight": table(pieces)}, after)
    with pytest.raises(UserError, match=said):
        compress.load(str(folder))


def test_a_variant_s_config_alone_says_nothing_of_texts(pieces: Tokenizer, tmp_path: Path) -> None:
    folder = model2vec_folder(tmp_path / "m2v", pieces, {"embeddings": table(pieces)})
    config = ModelFolder("tiny", folder).config
    write_json(folder / "config.json", config)
    with pytest.raises(UserError, match=r"variant\.json is missing"):
        compress.load(str(folder))
