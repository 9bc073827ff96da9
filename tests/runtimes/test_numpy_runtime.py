"""numpy runs static tables without torch: the integers of a variant, long and empty texts, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from static_support import TEXTS, model2vec_folder, shared_tensors, static_embedding_folder, table, uncut
from tests_support import compress_to, folder_of, network_of
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import compress
from compress.common.errors import UserError
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.vocabulary import Vocabulary
from compress.models.files.variant import VariantInfo
from compress.runtimes.contract import AUTO, NUMPY, RUNTIMES, Kind, pick_runtime
from compress.runtimes.lower import lower
from compress.runtimes.numpy_runtime import PIECE, token_vectors


@pytest.fixture(scope="module", params=["StaticEmbedding", "model2vec"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static table in both layouts; model2vec's with tokens that share vectors and have factors."""
    pieces = uncut(tokenizer.backend_tokenizer)
    folder = tmp_path_factory.mktemp("static") / "model"
    if request.param == "model2vec":
        return model2vec_folder(folder, pieces, shared_tensors(pieces), normalize=True)
    return static_embedding_folder(folder, pieces, {"embedding.weight": table(pieces)}, "Normalize")


@pytest.mark.parametrize(
    "step",
    [Embeddings(bits=8), Embeddings(bits=4), Embeddings(bits=4, group_size=16), Embeddings(bits=3, group_size=10), None],
    ids=["int8", "int4", "int4-g16", "int3-g10", "float16"],
)
def test_packed_rows_are_the_unpacked_ones(model: Path, tmp_path: Path, step: Embeddings | None) -> None:
    compress_to(model, tmp_path / "v", *([step] if step else []))
    variant = folder_of(tmp_path / "v")
    ids = np.arange(variant.config["vocab_size"])
    packed = token_vectors(variant)
    network = network_of(tmp_path / "v")
    unpacked = network.embeddings(torch.from_numpy(ids)[None])[0].float().numpy()
    assert packed(ids).dtype == np.float32
    np.testing.assert_allclose(packed(ids), unpacked, rtol=2e-3 if step is None else 1e-6)  # float16 products there
    ours, theirs = (compress.load(str(tmp_path / "v"), runtime=name, device="cpu").encode(TEXTS) for name in (NUMPY, "torch"))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("runtime", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_graphs_of_a_table(model: Path, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    compress_to(model, tmp_path / "v", Embeddings(bits=4, group_size=8))
    lower(folder_of(tmp_path / "v"), runtime)
    ours, theirs = (compress.load(str(tmp_path / "v"), runtime=name).encode(TEXTS) for name in (NUMPY, runtime))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_texts_that_need_no_dropped_token_keep_their_vectors(model: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS[:3]))
    compress_to(model, tmp_path / "v", Vocabulary(texts=str(tmp_path / "texts.txt")))
    small, whole = compress.load(str(tmp_path / "v"), runtime=NUMPY), compress.load(str(model))
    np.testing.assert_allclose(small.encode(TEXTS[:3]), whole.encode(TEXTS[:3]), atol=1e-3)  # float16
    variant = folder_of(tmp_path / "v")
    kept = variant.compressed.steps[0]["tokens"]
    assert 20 < kept < folder_of(model).config["vocab_size"] == len(token_rows(model))
    assert variant.config["vocab_size"] == len(token_rows(tmp_path / "v")) == kept
    step = Vocabulary(texts=str(tmp_path / "texts.txt"), tokens=kept)
    planned = step.estimate(folder_of(model).shape).after
    assert {name: info.shape for name, info in planned.tensors.items()} == {
        name: info.shape for name, info in variant.headers.items()
    }
    assert planned.bytes == variant.shape.bytes
    assert np.isfinite(small.encode(["a quite different sentence about umbrellas", "☂ 雨"])).all()


def token_rows(folder: Path) -> np.ndarray:
    """The vectors of all tokens that a folder's tokenizer knows."""
    found = folder_of(folder)
    definition = found.tokenizer.definition()["model"]["vocab"]
    return token_vectors(found)(np.arange(len(definition)))


def test_lengths_and_batches_change_nothing(model: Path, mixed_texts: list[str]) -> None:
    embedder = compress.load(str(model))
    texts = mixed_texts[:80] + ["a " * count for count in (PIECE - 1, PIECE, PIECE + 1, 2 * PIECE)]
    expected = np.concatenate([embedder.encode([text]) for text in texts])
    for budget in (1, 70, 100_000):
        np.testing.assert_allclose(embedder.encode(texts, batch_tokens=budget), expected, atol=1e-6)
    assert embedder.encode([]).shape == (0, embedder.dimension)
    assert not embedder.encode(["", ""]).any()
    with pytest.raises(TypeError, match=r"texts\[1\] is NoneType"):
        embedder.encode(["a", None])  # type: ignore[list-item]


def test_a_value_that_is_not_finite_is_an_error(pieces: Tokenizer, tmp_path: Path) -> None:
    vectors = table(pieces)
    vectors[pieces.token_to_id("a")] = np.nan
    folder = static_embedding_folder(tmp_path / "st", pieces, {"embedding.weight": vectors})
    with pytest.raises(FloatingPointError, match="not finite, for 'a'"):
        compress.load(str(folder)).encode(["b", "a"])


WITHOUT_TORCH = """
import sys
import compress
vectors = [compress.load(folder).encode(["the parcel never came", ""]) for folder in sys.argv[1:]]
assert all(vectors[0].shape == made.shape and made[0].any() for made in vectors)
heavy = {"torch", "transformers", "sentence_transformers", "onnxruntime"} & set(sys.modules)
assert not heavy, heavy
"""


def test_neither_a_table_nor_its_variant_needs_torch(model: Path, tmp_path: Path) -> None:
    compress_to(model, tmp_path / "v", Embeddings(bits=4))
    info = VariantInfo.read(tmp_path / "v")
    info.model_copy(update={"runtime": NUMPY}).write(tmp_path / "v")
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(model), str(tmp_path / "v")], check=True)


def test_what_opens_in_numpy_and_what_does_not(model: Path, bert: Path) -> None:
    assert pick_runtime(AUTO, {}, kind=Kind(static=True)) == NUMPY == next(iter(RUNTIMES))
    assert pick_runtime(AUTO, {}) != NUMPY
    with pytest.raises(UserError, match="numpy executes static tables only"):
        pick_runtime(NUMPY, {})
    with pytest.raises(UserError, match="numpy executes static tables only"):
        compress.load(str(bert), runtime=NUMPY)
    with pytest.raises(UserError, match="numpy runs on the CPU here, not on cuda"):
        compress.load(str(model), runtime=NUMPY, device="cuda")
    with pytest.raises(UserError, match="numpy does not compute in float16"):
        compress.load(str(model), runtime=NUMPY, dtype="float16")
    with pytest.raises(UserError, match="onnxruntime executes variants, and this is a checkpoint"):
        compress.load(str(model), runtime="onnxruntime")
    assert compress.load(str(model), device="cpu", dtype="float16").dtype.itemsize == 2  # in torch
    streamed = compress.load(str(model), device="cpu", stream=True)
    np.testing.assert_allclose(streamed.encode(TEXTS), compress.load(str(model)).encode(TEXTS), atol=1e-6)
