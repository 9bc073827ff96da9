"""Files that earlier versions wrote are read as they were meant: recipes, variants, records, and runs that were killed.

Each folder next to this file has the name of the version that wrote it, and a script that shows how.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.common.journal import Journal
from compress.measure.record import Record

# These are the only names from inside the package that this file uses; the rest goes through `compress.load`, `compress.run` and
# the verbs.
from compress.pipeline.recipe_file import read_recipe
from compress.runtimes.onnx_runtime import OnnxEmbedder

FILES = Path(__file__).parent / "v0.1"
(RUN,) = (FILES / "runs").iterdir()
TEXTS: list[str] = json.loads((FILES / "texts" / "embedded.json").read_text(encoding="utf-8"))
VECTORS = load_file(FILES / "vectors.safetensors")
FOLDERS = {"model": FILES / "model", "run": RUN} | {folder.name: folder for folder in (FILES / "variants").iterdir()}
EMBEDDERS = sorted({tuple(name.split("/")[:2]) for name in VECTORS})
PROMPTS = dict.fromkeys(FOLDERS, "query: ") | {"nv-embed": "Instruct: Find the parcel\nQuery: "}

ROUNDING = 1e-5
"""How far a value of a unit vector may be off where nothing but sums of floats differs. Kernels without AVX came within 3e-7."""
ROUNDS_ACTIVATIONS = ("run", "mixed", "nv-embed")
"""Variants whose activations are rounded. Where sums differ in their last digits, a value next to a tie may be rounded the other way,
which happens to few texts and moves the vectors of these visibly, so small is the network."""
FLIPPED_COSINE = 0.9999
"""What such a text keeps: with two values flipped in each text, the lowest cosine was 0.99995."""


def contains(found: Any, stored: Any, place: str = "") -> None:
    """See that what was read says all that is stored; later versions may say more, and leave out a key that says nothing."""
    if isinstance(stored, dict):
        assert isinstance(found, dict), place
        for key, value in stored.items():
            assert key in found or value is None, f"{place}.{key}"
            contains(found.get(key), value, f"{place}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), place
        for index, (one, other) in enumerate(zip(found, stored, strict=True)):
            contains(one, other, f"{place}.{index}")
    else:
        assert found == stored, place


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_every_stored_variant_has_vectors() -> None:
    assert {name for name, _ in EMBEDDERS} == set(FOLDERS)
    assert {runtime for _, runtime in EMBEDDERS} == {"torch", "onnxruntime", "openvino"}


@pytest.mark.parametrize(("name", "runtime"), EMBEDDERS)
def test_stored_variants_give_the_vectors_that_they_gave(tmp_path: Path, name: str, runtime: str) -> None:
    """onnxruntime and OpenVINO read the graphs that an earlier version left next to the weights."""
    if runtime == "openvino":
        pytest.importorskip("openvino", reason="the extra `openvino` is not installed")
    folder = shutil.copytree(FOLDERS[name], tmp_path / name)
    embedder = compress.load(str(folder), runtime=runtime, device="cpu")
    for case, prompt in {"default": None, "prompt": PROMPTS[name]}.items():
        found, stored = embedder.encode(TEXTS, prompt), VECTORS[f"{name}/{runtime}/{case}"]
        assert found.shape == stored.shape
        apart = np.abs(found - stored).max(axis=1)
        if name in ROUNDS_ACTIVATIONS:
            assert cosines(found, stored).min() >= FLIPPED_COSINE
            # Activations that are left in floating point move every text by more than 1e-3.
            assert statistics.median(apart) <= ROUNDING
        else:
            assert apart.max() <= ROUNDING


def test_a_variant_runs_by_itself_in_what_it_was_made_for(tmp_path: Path) -> None:
    folder = shutil.copytree(FOLDERS["int4"], tmp_path / "int4")
    embedder = compress.load(str(folder))
    assert isinstance(embedder, OnnxEmbedder)
    assert (embedder.name, embedder.dimension, embedder.spec.default_prompt) == ("int4", 32, "passage: ")
    assert embedder.spec.prompts == {"query": "query: ", "passage": "passage: "}
    np.testing.assert_allclose(embedder.encode(TEXTS), VECTORS["int4/onnxruntime/default"], rtol=0, atol=ROUNDING)


def test_a_recipe_with_every_key_says_what_it_said() -> None:
    recipe = read_recipe(FILES / "recipes" / "everything.yaml")
    contains(recipe.model_dump(mode="json"), json.loads((FILES / "recipes" / "everything.json").read_text(encoding="utf-8")))
    assert (recipe.name, recipe.seed, recipe.fold, recipe.dtype) == ("all-keys", 3, False, "bfloat16")
    assert [step.method for step in recipe.steps][:4] == ["depth", "depth", "vocabulary", "mean_pooling"]
    assert (recipe.evaluate.margin, recipe.measure.lengths, recipe.gates.size_ratio) == (0.02, (16, 64), 0.6)
    assert recipe.calibration.prompts == ("query: ", "")
    assert recipe.export[:2] == ("variant", "transformers")


def test_the_command_line_plans_an_old_recipe() -> None:
    planned = CliRunner().invoke(app, ["plan", str(FILES / "recipes" / "killed.yaml"), "--model", str(FILES / "model")])
    assert planned.exit_code == 0, planned.output
    assert "wanda" in planned.output


def test_an_old_record_is_read_whole() -> None:
    record, stored = Record.read(RUN), json.loads((RUN / "record.json").read_text(encoding="utf-8"))
    contains(record.model_dump(mode="json"), stored)
    assert (record.schema_version, record.run, record.created[:4]) == (1, RUN.name, "2026")
    assert (record.model.architecture, record.model.licence, record.model.dimension) == ("bert", "apache-2.0", 32)
    assert [step.config["method"] for step in record.steps] == ["depth", "distill", "rtn", "embeddings"]
    assert [look["step"] for look in record.steps[1].found["curve"]] == [2, 4]
    pairs, retrieval = record.tasks
    assert (pairs.task, pairs.verdict, pairs.prompts) == ("MiniPairClassification", "inconclusive", {"text": "passage: "})
    assert pairs.delta == stored["tasks"][0]["variant"] - stored["tasks"][0]["baseline"]
    assert pairs.interval is not None
    assert pairs.interval.low == stored["tasks"][0]["interval"]["low"]
    assert sorted(retrieval.index.values()) == sorted(stored["tasks"][1]["index"].values())
    assert record.overall is not None
    assert record.overall.verdict == "inconclusive"
    assert record.fidelity is not None
    assert record.fidelity.texts == 16
    variant = record.row("variant")
    assert (variant.weights, variant.activations, variant.size_bytes) == ("int8 less 1 block", "dynamic_per_token", 35576)
    assert variant.speed is not None
    assert variant.speed.cells[0].length == 8
    assert [(gate.name, gate.kept) for gate in record.gates] == [("retained", True), ("cosine_mean", True), ("size_ratio", False)]
    assert record.machine.cores == 2
    assert record.versions["torch"] == "2.13.0+cpu"


def test_the_recipe_of_an_old_run_is_its_record_s() -> None:
    contains(read_recipe(RUN / "recipe.yaml").model_dump(mode="json"), json.loads((RUN / "record.json").read_text())["recipe"])


def test_old_runs_are_compared() -> None:
    stored = json.loads((RUN / "record.json").read_text(encoding="utf-8"))
    compared = CliRunner().invoke(app, ["compare", str(FILES / "runs"), "--format", "json"])
    assert compared.exit_code == 0, compared.output
    found = json.loads(compared.output)
    assert not found["broken"]
    (group,) = found["groups"]
    (line,) = group["lines"]
    assert (group["model"], group["tasks"], group["measured_on"]) == (
        "model",
        ["MiniPairClassification", "MiniRetrieval"],
        stored["measured_on"],
    )
    assert (line["run"], line["recipe"], line["weights"]) == (RUN.name, "measured", "int8 less 1 block")
    assert (line["kept"], line["cosine"]) == (stored["retained"], stored["fidelity"]["cosine_mean"])
    variant = stored["rows"][-1]
    assert (line["bytes"], line["speedup"]) == (variant["size_bytes"], variant["speedup"]["float32"])
    assert (line["latency_ms"], line["peak_bytes"]) == (variant["speed"]["latency_p50_ms"], variant["speed"]["peak_bytes"])


class Stopped(Exception):
    """Stands for whatever ends a process."""


def killed(name: str, output: Path, run: Callable[..., Any]) -> Path:
    """Put what a killed run left in the place of the same run's folder here.

    Args:
        name: of the run in `killed/`.
        output: folder of runs, which the run is going to be continued in.
        run: runs the recipe. What decides a run's name differs between machines; so it is begun here, and stopped at once.

    Returns:
        The hidden folder of the run.
    """

    def stop(_: str) -> None:
        if any(output.glob(".*.partial")):
            raise Stopped

    with pytest.raises(Stopped):
        run(output=output, say=stop)
    (hidden,) = output.iterdir()
    shutil.rmtree(hidden)
    return Path(shutil.copytree(FILES / "killed" / name, hidden))


def run_killed(**arguments: Any) -> Record:
    return compress.run(FILES / "recipes" / "killed.yaml", model=str(FILES / "model"), device="cpu", **arguments)


def test_a_variant_that_an_earlier_version_began_is_finished_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with two of three segments done, the calibration texts' hidden states kept in front of the last."""
    monkeypatch.chdir(FILES)  # where the recipe's texts are

    def run(**arguments: Any) -> Record:
        return run_killed(compress_only=True, **arguments)

    whole = run(output=tmp_path / "whole", say=lambda _: None)
    folder = killed("making", tmp_path / "killed", run)
    journal = Journal(folder / "journal")
    assert [journal.has(f"segment {index}") for index in range(3)] == [True, True, False]
    assert journal.get("step-0")["decision"] == {"drop": [0]}
    # Seconds that nothing here takes: a part that is made anew has others.
    segment = journal.get("segment 1")
    assert segment["segment"] == "encoder.layer.0"
    journal.put("segment 1", {**segment, "seconds": [0.0, 1000.0, 2000.0, 0.0]})
    journal.put("step-0", {**journal.get("step-0"), "seconds": 3000.0})
    continued = run(output=tmp_path / "killed", say=lambda _: None)
    assert [step.seconds // 1000 for step in continued.steps] == [3, 1, 2, 0]
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / record.run / "variant").iterdir()}
        for name, record in (("whole", whole), ("killed", continued))
    ]
    assert set(files[0]) >= {"variant.json", "model.safetensors", "config.json", "tokenizer.json"}
    assert files[0] == files[1]


def test_what_an_earlier_version_had_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with the variant made and both models scored; the variant's score is taken away, and its vectors are still there."""
    monkeypatch.chdir(FILES)
    folder = killed("measuring", tmp_path, run_killed)
    journal = Journal(folder / "journal")
    baseline, variant = (journal.get(f"accuracy {role} MiniSTS") for role in ("baseline", "variant"))
    (folder / "journal" / "accuracy-variant-MiniSTS.json").unlink()
    kept = {path.name for path in (folder / "journal" / "vectors").iterdir()}
    while_scoring = []

    def say(line: str) -> None:
        if "MiniSTS" in line:
            while_scoring.append({path.name for path in (folder / "journal" / "vectors").iterdir()})

    reference, steps = journal.get("reference"), journal.get("steps")["steps"]
    record = run_killed(output=tmp_path, say=say)
    assert while_scoring
    assert all(names == kept for names in while_scoring)  # nothing was embedded again
    (task,) = record.tasks
    assert (task.baseline, task.variant) == (baseline["score"], pytest.approx(variant["score"], abs=1e-9))
    assert task.interval is not None
    assert task.interval.examples == 204
    assert record.baseline == f"{reference['dtype']}: {reference['why']}"
    contains(record.model_dump(mode="json")["steps"], steps)
    np.testing.assert_allclose(
        compress.load(str(tmp_path / record.run), device="cpu").encode(TEXTS),
        compress.load(str(FILES / "killed" / "measuring" / "variant"), device="cpu").encode(TEXTS),
        rtol=0,
        atol=0,
    )
