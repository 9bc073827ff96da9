"""Vectors after the model: known answers, sizes, and retrieval with them."""

from __future__ import annotations

import numpy as np
import pytest

import compress
from compress.common.errors import UserError
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.measure.vectors.codec import VectorCodec, VectorFormat, rotation, unit
from compress.reports.terminal import print_evaluation

GENERATOR = np.random.default_rng(0)
# Vectors as embedders make them: of unit length, with few strong directions.
VECTORS = unit((GENERATOR.standard_normal((600, 64)) * GENERATOR.permutation(np.linspace(2, 0.2, 64)) + 0.5).astype(np.float32))
CALIBRATION, DOCUMENTS, QUERIES = VECTORS[:300], VECTORS[300:], unit(VECTORS[300:350] + 0.02 * VECTORS[250:300])


def codec(name: str) -> VectorCodec:
    return VectorCodec(VectorFormat.parse(name), CALIBRATION)


@pytest.mark.parametrize(
    ("name", "expected", "size"),
    [
        ("float32", (None, None, "float32", False), 256),
        ("int8", (None, None, "int8", False), 64),
        ("pca-16", ("pca", 16, "float32", False), 64),
        ("truncate-20+int8", ("truncate", 20, "int8", False), 20),
        ("binary+rescore", (None, None, "binary", True), 8),
        ("pca-20+binary", ("pca", 20, "binary", False), 3),
    ],
)
def test_names_and_sizes(name: str, expected: tuple[object, ...], size: int) -> None:
    scheme = VectorFormat.parse(name)
    assert (scheme.reduction, scheme.dimensions, scheme.store, scheme.rescore) == expected
    assert scheme.bytes_per_vector(64) == size
    assert VectorCodec(scheme, CALIBRATION).encode(DOCUMENTS).nbytes == size * len(DOCUMENTS)
    assert VectorFormat.parse(scheme.name) == scheme


@pytest.mark.parametrize("name", ["", "int4", "pca", "int8+rescore", "truncate-x", "binary+"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="vector format "):
        VectorFormat.parse(name)


def test_more_dimensions_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="keeps 65 dimensions of a model with 64"):
        codec("truncate-65")
    with pytest.raises(UserError, match="and 10 calibration texts"):
        VectorCodec(VectorFormat.parse("pca-16"), CALIBRATION[:10])


def test_int8_is_within_half_a_step() -> None:
    made = codec("int8")
    inside = CALIBRATION[10:200]
    error = np.abs(made.decode(made.encode(inside)) - inside)
    step = (np.percentile(CALIBRATION, 99.9, axis=0) - np.percentile(CALIBRATION, 0.1, axis=0)) / 255
    assert np.mean(error <= step / 2 + 1e-6) > 0.99


def test_pca_keeps_most_and_truncation_the_leading_ones() -> None:
    exact = DOCUMENTS @ DOCUMENTS.T
    errors = {}
    for name in ("pca-24", "truncate-24"):
        reduced = codec(name).reduce(DOCUMENTS)
        errors[name] = np.abs(reduced @ reduced.T - exact).mean()
    assert errors["pca-24"] < 0.8 * errors["truncate-24"]
    np.testing.assert_allclose(codec("truncate-24").reduce(DOCUMENTS), unit(DOCUMENTS[:, :24]), rtol=1e-6)
    whole = codec("pca-64").reduce(DOCUMENTS)  # all directions: a rotation, which changes no angle
    np.testing.assert_allclose(whole @ whole.T, exact, atol=1e-5)


def test_what_is_fitted_does_not_depend_on_what_is_stored() -> None:
    made = codec("pca-16+int8")
    np.testing.assert_array_equal(made.encode(DOCUMENTS)[:7], made.encode(DOCUMENTS[:7]))


@pytest.mark.parametrize(
    ("name", "least"), [("float32", 1.0), ("int8", 1.0), ("pca-32", 0.95), ("binary+rescore", 0.95), ("binary", 0.8)]
)
def test_the_nearest_document_is_found(name: str, least: float) -> None:
    made = codec(name)
    scores, found = made.search(QUERIES, made.encode(DOCUMENTS), 10)
    assert (found[:, 0] == np.arange(50)).mean() >= least
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in found.tolist())


def test_bits_are_compared_one_by_one() -> None:
    made = codec("binary")
    stored = made.encode(DOCUMENTS[:3])
    scores, found = made.search(DOCUMENTS[:1], stored, 3)
    assert (found[0, 0], scores[0, 0]) == (0, 1)
    bits = np.unpackbits(stored, axis=1, count=64)
    expected = 1 - 2 * (bits[0] != bits[found[0, 1]]).sum() / 64
    assert scores[0, 1] == pytest.approx(expected)


def test_a_rotation_between_two_spaces_is_found() -> None:
    turn, _ = np.linalg.qr(GENERATOR.standard_normal((64, 64)))
    found = rotation(CALIBRATION, (CALIBRATION @ turn).astype(np.float32))
    np.testing.assert_allclose(found @ found.T, np.eye(64), atol=1e-5)
    np.testing.assert_allclose(DOCUMENTS @ found, DOCUMENTS @ turn, atol=0.1)
    np.testing.assert_allclose(rotation(CALIBRATION[:5], CALIBRATION[:5]), np.eye(64), atol=1e-5)  # too few texts to say more


@pytest.mark.slow
def test_a_table_of_vector_formats(minilm) -> None:
    options = EvaluationOptions(device="cpu", vector_formats=["float32", "int8", "binary"])
    found = evaluate("minilm", ["MiniRetrieval", "MiniSTS"], options, say=lambda _: None)
    rows = {row.format: row for row in found.vector_formats}
    whole = {task.task: task.variant for task in found.tasks}["MiniRetrieval"]
    assert rows["float32"].scores == {"MiniRetrieval": pytest.approx(whole, abs=1e-5)}
    assert rows["float32"].intervals["MiniRetrieval"].high == pytest.approx(0, abs=1e-9)
    assert rows["int8"].bytes_per_million * 4 == rows["float32"].bytes_per_million == 384 * 4 * 10**6
    assert abs(rows["int8"].scores["MiniRetrieval"] - whole) < 0.02
    assert rows["binary"].scores["MiniRetrieval"] < whole - 0.01


@pytest.mark.parametrize("paired", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_table_of_vector_formats_is_printed_alone_and_in_pairs(
    bert, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, paired: bool
) -> None:
    monkeypatch.chdir(bert.parent)  # a short name breaks no line
    options, model = EvaluationOptions(device="cpu", vector_formats=["int8"]), f"./{bert.name}"
    found = evaluate(model, ["MiniRetrieval"], options, against=model if paired else None, say=lambda _: None)
    print_evaluation(found)
    printed = capsys.readouterr().out
    assert f"vectors of {bert.name} stored in fewer bytes" in printed
    assert (f"against {bert.name}" in printed) == paired


def test_evaluate_compares_in_pairs_and_refuses_random_weights(minilm) -> None:
    said: list[str] = []
    found = evaluate("minilm", ["MiniSTS"], EvaluationOptions(device="cpu"), against="minilm", say=said.append)
    assert found.overall is not None
    assert (found.overall.low, found.overall.high, found.overall.verdict) == (0, 0, "kept")
    assert len(said) == 2
    assert found.mteb["MiniSTS"]["task_name"] == "MiniSTS"
    assert compress.load is not None
    with pytest.raises(UserError, match="cannot be measured on random weights"):
        evaluate("random:minilm,num_hidden_layers=1", ["MiniSTS"], EvaluationOptions(device="cpu"))
