"""Runs as a folder of mteb's results: mteb reads them back, with the scores of the records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mteb
import pytest

import compress
from compress.common.errors import UserError
from compress.measure.record import Record
from compress.pipeline.recipe_file import parse_recipe
from compress.reports.leaderboard import write_leaderboard

TASKS = ["MiniSTS", "MiniReranking"]


@pytest.fixture(scope="module")
def run(make_model, tmp_path_factory: pytest.TempPathFactory) -> Path:  # type: ignore[no-untyped-def]
    """A run of a tiny model on two tasks."""
    model = make_model("bert")
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    recipe = {
        "name": "three-bits", "model": str(model), "steps": [{"method": "rtn", "bits": 3, "activations": "none"}],
        "evaluate": {"tasks": TASKS}, "measure": {"what": []},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("runs")
    return folder / compress.run(parse_recipe(recipe), output=folder, say=lambda _: None).run


def test_mteb_reads_the_scores_of_the_record(run: Path, tmp_path: Path) -> None:
    record = Record.read(run)
    assert any(abs(row.delta) > 1e-3 for row in record.tasks)  # the two roles are not each other's
    baseline, variant = write_leaderboard([run], tmp_path)
    assert variant == tmp_path / "results" / f"compress__{record.run.rpartition('-')[0]}" / record.run.rpartition("-")[2]
    assert baseline.name == record.model.fingerprint
    read = mteb.ResultCache(tmp_path).load_results(include_remote=False)  # which passes over folders without a model_meta.json
    assert len(read.model_results) == 2
    by_revision = {result.model_revision: result for result in read.model_results}
    for folder, role in ((baseline, "baseline"), (variant, "variant")):
        scores = {result.task_name: result.get_score() for result in by_revision[folder.name].task_results}
        assert scores == {row.task: pytest.approx(getattr(row, role), abs=1e-6) for row in record.tasks}
        assert by_revision[folder.name].model_name == folder.parent.name.replace("__", "/")


def test_the_meta_says_what_the_record_holds_and_nothing_else(run: Path, tmp_path: Path) -> None:
    record = Record.read(run)
    baseline, variant = (json.loads((folder / "model_meta.json").read_text()) for folder in write_leaderboard([run], tmp_path))
    assert (baseline["n_parameters"], baseline["embed_dim"]) == (record.model.parameters, record.model.dimension)
    assert baseline["max_tokens"] == record.model.max_length
    assert variant["adapted_from"] == record.model.name
    assert variant["memory_usage_mb"] == record.row("variant").size_bytes / 2**20
    assert baseline["license"] == variant["license"] == record.model.licence == "mit"
    for unknown in ("n_parameters", "embed_dim", "training_datasets", "release_date", "languages"):
        assert variant[unknown] is None


def test_what_a_run_does_not_hold_is_refused(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "runs" / run.name
    shutil.copytree(run, copied)
    kept = copied / "mteb" / "variant" / "MiniSTS.json"
    text = kept.read_text()
    kept.write_text(text.replace('"MiniSTS"', '"STS12"'))
    with pytest.raises(UserError, match=r"MiniSTS.json: says STS12"):
        write_leaderboard([copied], tmp_path)
    shutil.copy(copied / "mteb" / "baseline" / "MiniSTS.json", kept)
    with pytest.raises(UserError, match=r"says MiniSTS 0\.\d+, and the record MiniSTS"):
        write_leaderboard([copied], tmp_path)
    kept.write_text("{}")
    with pytest.raises(UserError, match="is no result of mteb's"):
        write_leaderboard([copied], tmp_path)
    kept.unlink()
    with pytest.raises(UserError, match="a record alone holds only the main score"):
        write_leaderboard([copied], tmp_path)
    record = Record.read(copied)
    record.model_copy(update={"tasks": (), "retained": None, "overall": None}).write(copied)
    with pytest.raises(UserError, match="was not scored on tasks"):
        write_leaderboard([copied], tmp_path)
    assert not (tmp_path / "results").exists()


def test_other_scores_of_the_same_model_are_not_replaced(run: Path, tmp_path: Path) -> None:
    _, variant = write_leaderboard([run], tmp_path)
    assert write_leaderboard([run], tmp_path)[1] == variant  # the same again
    path = variant / "MiniSTS.json"
    other = json.loads(path.read_text())
    for score in other["scores"]["test"]:
        score["main_score"] += 0.1
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="for the same model"):
        write_leaderboard([run], tmp_path)
