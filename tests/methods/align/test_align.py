"""Alignment: a turned copy of a model is turned back exactly, everything that runs or exports a variant carries the map, and what
cannot be aligned is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from align_support import texts_file, turn, with_dense
from static_support import WIDTH as STATIC_WIDTH
from static_support import model2vec_folder, table
from tests_support import TEXTS, compress_to, encoded, folder_of, half_exact

import compress
from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.export import export
from compress.export.reader import run_example
from compress.measure.vectors.codec import unit
from compress.measure.vectors.fidelity import cosines
from compress.methods.align.method import Align
from compress.methods.nv_embed.fold import Fold
from compress.methods.nv_embed.mean_pooling import MeanPooling
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VARIANT_FILE, VariantInfo
from compress.runtimes.exported import open_export

LIKE = list(suite_texts()[:40])
INT8 = RTN(bits=8)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_file(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def old(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that made the index."""
    return half_exact(Path(shutil.copytree(bert, tmp_path_factory.mktemp("old") / "old")))


@pytest.fixture(scope="module")
def turned(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of it whose vectors are turned."""
    return with_dense(old, tmp_path_factory.mktemp("turned") / "turned", turn(48))


@pytest.fixture(scope="module")
def aligned(turned: Path, old: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("aligned") / "run" / "variant"
    compress_to(turned, target, Align(to=str(old), texts=str(texts), map="rotation"))
    return target


def test_a_turned_copy_is_turned_back(aligned: Path, turned: Path, old: Path) -> None:
    theirs = encoded(old, LIKE)
    assert cosines(encoded(turned, LIKE), theirs).mean() < 0.5
    found = encoded(aligned, LIKE)
    assert cosines(found, theirs).min() > 1 - 1e-5
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(encoded(aligned, LIKE, stream=True), found, atol=1e-6)


def test_the_variant_says_to_what_it_is_aligned(aligned: Path, old: Path) -> None:
    info = VariantInfo.read(aligned)
    to = info.aligned_to
    assert to is not None
    assert (to.name, to.fingerprint, to.method, to.trained, to.texts, to.held_out) == (
        old.name, folder_of(old).fingerprint, "rotation", False, 560, 140,
    )  # fmt: skip
    assert to.cosine_p1 > 1 - 1e-5
    assert to.overlap_at_10 > 0.99
    assert [module.kind for module in info.spec.modules] == ["Dense", "Normalize", "Dense"]


def test_a_linear_map_undoes_what_is_no_rotation(old: Path, texts: Path, tmp_path: Path) -> None:
    stretched = with_dense(old, tmp_path / "stretched", turn(48) * np.geomspace(1, 4, 48), normalize=False)
    for name, lowest in (("linear", 0.9999), ("rotation", 0.0)):
        compress_to(stretched, tmp_path / name, Align(to=str(old), texts=str(texts), map=name))  # type: ignore[arg-type]
        found = float(cosines(encoded(tmp_path / name, LIKE), encoded(old, LIKE)).min())
        assert found > lowest
        assert (found > 0.999) == (name == "linear")


@pytest.mark.parametrize("width", [24, 64])
def test_widths_may_differ_and_normalisation_and_similarity_are_the_other_model_s(
    old: Path, texts: Path, tmp_path: Path, width: int
) -> None:
    other = with_dense(old, tmp_path / "other", 3 * turn(64)[:48, :width], normalize=False, similarity="dot")
    compress_to(old, tmp_path / "variant", Align(to=str(other), texts=str(texts)))
    info, found = VariantInfo.read(tmp_path / "variant"), encoded(tmp_path / "variant", LIKE)
    assert (info.spec.normalize, info.spec.similarity, found.shape[1]) == (False, "dot", width)
    assert cosines(found, encoded(other, LIKE)).min() > 0.99
    lengths = [np.linalg.norm(vectors, axis=1).mean() for vectors in (found, encoded(other, LIKE))]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_both_models_see_their_own_prompt(make_model, texts: Path, tmp_path: Path) -> None:
    new = make_model("bert", prompts={"query": "nobody in the museum knew who it was for: "})
    other = make_model("bert", prompts={"query": "the parcel never came, rain by the evening: "})
    compress_to(new, tmp_path / "variant", Align(to=str(other), texts=str(texts)))
    ours, theirs = compress.load(tmp_path / "variant", device="cpu"), compress.load(other, device="cpu")
    wrong = cosines(ours.encode(LIKE), theirs.encode(LIKE, task="query")).mean()
    assert cosines(ours.encode(LIKE, task="query"), theirs.encode(LIKE, task="query")).mean() > wrong + 0.002


def test_the_map_follows_what_earlier_steps_left(old: Path, turned: Path, texts: Path, tmp_path: Path) -> None:
    compress_to(turned, tmp_path / "variant", INT8, Align(to=str(old), texts=str(texts)))
    compress_to(turned, tmp_path / "int8", INT8)
    info = VariantInfo.read(tmp_path / "variant")
    assert [step["method"] for step in info.steps] == ["rtn", "align"]
    assert set(info.quantized) == set(VariantInfo.read(tmp_path / "int8").quantized)
    dense = folder_of(tmp_path / "variant").tensors["text_head.after.2.linear.weight"].read()
    matrix = np.frombuffer(dense, np.float16).reshape(48, 48).astype(np.float32)
    own = encoded(tmp_path / "int8", LIKE)
    shift = np.frombuffer(folder_of(tmp_path / "variant").tensors["text_head.after.2.linear.bias"].read(), np.float16)
    np.testing.assert_allclose(encoded(tmp_path / "variant", LIKE), unit(own @ matrix.T + shift), atol=1e-4)
    assert cosines(encoded(tmp_path / "variant", LIKE), encoded(old, LIKE)).min() > 0.99


def test_training_starts_from_the_map_and_lowers_the_loss(
    old: Path, texts: Path, tmp_path: Path, make_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.methods.align.queries import Queries

    monkeypatch.setattr(Queries, "_steps", lambda *_: 50)
    other = make_model("mpnet")
    for name, minutes in (("fitted", 0.0), ("trained", 0.1)):
        compress_to(other, tmp_path / name, Align(to=str(old), texts=str(texts), minutes=minutes))
    info = VariantInfo.read(tmp_path / "trained")
    assert info.aligned_to is not None
    assert info.aligned_to.trained
    curve = [json.loads(line) for line in next(tmp_path.rglob("curve.jsonl")).open()]
    assert [look["step"] for look in curve] == [10, 20, 30, 40, 50]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["cosine"] == pytest.approx(info.aligned_to.cosine_mean, abs=2e-3)  # float16, and no bfloat16
    assert np.abs(encoded(tmp_path / "trained", LIKE) - encoded(tmp_path / "fitted", LIKE)).max() > 1e-3


def test_the_steps_of_a_training_follow_from_the_minutes(old: Path, turned: Path, texts: Path, tmp_path: Path) -> None:
    compress_to(turned, tmp_path / "variant", Align(to=str(old), texts=str(texts), minutes=0.02))
    steps = json.loads(next(tmp_path.rglob("pace.json")).read_text())["steps"]
    curve = [json.loads(line) for line in next(path for path in tmp_path.rglob("curve.jsonl") if path.parent.name != "pace").open()]
    assert curve[-1]["step"] == steps > 1


# ---------------------------------------------------------------------------------------------------------- runtimes and exports


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_graphs_carry_the_map(aligned: Path, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    np.testing.assert_allclose(encoded(aligned, TEXTS, runtime=runtime), encoded(aligned, TEXTS), atol=2e-5)


@pytest.mark.parametrize(
    ("format", "check"),
    [
        ("sentence-transformers", False),
        pytest.param("sentence-transformers", True, marks=pytest.mark.slow),
        pytest.param("onnx", True, marks=pytest.mark.slow),
    ],
)
def test_exports_carry_the_map(aligned: Path, old: Path, tmp_path: Path, format: str, check: bool) -> None:
    said: list[str] = []
    out = export(aligned.parent, format, tmp_path / "out", said.append, check=check)
    assert said[-1].startswith("Read back with " if check else "Not read back"), "and its vectors compared"
    if format == "onnx":
        assert cosines(open_export(out).encode(LIKE), encoded(old, LIKE)).min() > 1 - 1e-4
        return
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((out / "modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Dense", "Normalize", "Dense", "Normalize"]
    np.testing.assert_allclose(encoded(out, TEXTS), encoded(aligned, TEXTS), atol=2e-3)


@pytest.mark.parametrize("format", ["transformers", "gguf"])
def test_layouts_without_modules_refuse_it_by_name(aligned: Path, tmp_path: Path, format: str) -> None:
    with pytest.raises(UserError, match=f"cannot be written as {format}"):
        export(aligned.parent, format, tmp_path / "out")


@pytest.mark.parametrize("runtime", ["numpy", "torch"])
def test_a_static_table_is_aligned_in_its_own_runtime(old: Path, texts: Path, tmp_path: Path, pieces, runtime: str) -> None:
    static = model2vec_folder(tmp_path / "static", pieces, {"embeddings": table(pieces)}, normalize=True)
    compress_to(static, tmp_path / "variant", Align(to=str(old), texts=str(texts)))
    found, own = encoded(tmp_path / "variant", LIKE, runtime=runtime), encoded(static, LIKE)
    assert (found.shape[1], own.shape[1]) == (48, STATIC_WIDTH)
    assert cosines(found, encoded(old, LIKE)).mean() > 0.6
    with pytest.raises(UserError, match="a Normalize module after the mean"):
        export(tmp_path / "variant", "model2vec", tmp_path / "out")


# --------------------------------------------------------------------------------------------------------------------- refused


def test_what_cannot_be_aligned_is_refused_by_name(old: Path, aligned: Path, texts: Path, tmp_path: Path) -> None:
    step = Align(to=str(old), texts=str(texts))
    with pytest.raises(UserError, match="is aligned to old already"):
        compress_to(aligned, tmp_path / "b", step)
    with pytest.raises(UserError, match="its weights are random"):
        compress_to(old, tmp_path / "c", Align(to="random:nano", texts=str(texts)))
    few = tmp_path / "few.txt"
    few.write_text("\n".join(LIKE))
    with pytest.raises(UserError, match="32 different texts are left to fit a map on after holding out 8"):
        compress_to(old, tmp_path / "d", Align(to=str(old), texts=str(few)))
    assert not any((tmp_path / name).exists() for name in "bcd")


def test_nv_embed_may_be_either_of_the_two(nv_embed: Path, old: Path, texts: Path, tmp_path: Path) -> None:
    compress_to(old, tmp_path / "searches", Align(to=str(nv_embed), texts=str(texts)))
    assert encoded(tmp_path / "searches", LIKE).shape == encoded(nv_embed, LIKE).shape
    compress_to(nv_embed, tmp_path / "run" / "variant", Align(to=str(old), texts=str(texts)), Fold())
    found = encoded(tmp_path / "run", LIKE)
    assert cosines(found, encoded(old, LIKE)).mean() > 0.7
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoded(tmp_path / "run", LIKE, stream=True), found, atol=1e-5)
    compress_to(nv_embed, tmp_path / "whole" / "variant", Align(to=str(old), texts=str(texts)))
    with pytest.raises(UserError, match="cannot be written as nv-embed: it has a Dense module"):
        export(tmp_path / "whole", "nv-embed", tmp_path / "out")
    with pytest.raises(UserError, match="put mean_pooling before align"):
        compress_to(nv_embed, tmp_path / "none", Align(to=str(old), texts=str(texts)), MeanPooling())


@pytest.mark.slow
def test_an_nv_embed_s_graph_carries_the_map(nv_embed: Path, old: Path, texts: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    compress_to(nv_embed, tmp_path / "run" / "variant", Align(to=str(old), texts=str(texts)), Fold())
    found = encoded(tmp_path / "run", LIKE)
    np.testing.assert_allclose(encoded(tmp_path / "run", LIKE, runtime="onnxruntime"), found, atol=1e-4)


def test_a_variant_that_is_not_aligned_has_no_new_key(old: Path, tmp_path: Path) -> None:
    compress_to(old, tmp_path / "variant", INT8)
    assert "aligned_to" not in json.loads((tmp_path / "variant" / VARIANT_FILE).read_text())


def test_texts_of_the_evaluation_are_left_out(old: Path, turned: Path, texts: Path, tmp_path: Path) -> None:
    from compress.common.journal import Journal
    from compress.data.texts import read_texts, same_text
    from compress.pipeline.apply import make_variant
    from compress.pipeline.stage import BuildOptions

    evaluated = frozenset(same_text(text) for text in read_texts(texts)[:300])
    options = BuildOptions("0", lambda _: None, evaluated=lambda: evaluated)
    step = Align(to=str(old), texts=str(texts))
    (done,) = make_variant(folder_of(turned), folder_of(turned).shape, [step], tmp_path / "v", Journal(tmp_path / "j"), options)
    assert done["found"]["left_out"] == 300
    info = VariantInfo.read(tmp_path / "v")
    assert info.aligned_to is not None
    assert info.aligned_to.texts + info.aligned_to.held_out == 400


@pytest.mark.slow
def test_the_example_of_the_card_gives_the_aligned_vectors(aligned: Path, tmp_path: Path) -> None:
    from compress.export.reader import Reader, in_sentence_transformers

    out = export(aligned.parent, "sentence-transformers", tmp_path / "out", check=False)
    reader = Reader("sentence-transformers", (), in_sentence_transformers())
    np.testing.assert_allclose(run_example(out, reader, TEXTS, ""), encoded(aligned, TEXTS), atol=2e-3)
