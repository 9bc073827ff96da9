"""Other people's results in the picture: what is read, where it stands, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dashboard_support import mteb_result, write

from compress.measure.record import Record
from compress.reports.dashboard.imported import read_imported
from compress.reports.dashboard.payload import payload

RESULTS = Path(__file__).parents[3] / "results"
RUN = RESULTS / "int8-minilm-69839f2b"


def hakari_result(task: str, score: float, **variants: float) -> dict[str, Any]:
    """A result as HAKARI-Bench writes it: the model, and its vectors stored in other ways."""
    entries = [
        {"name": name, "aggregate_metric": "ndcg@10", "aggregate_metric_value": value}
        for name, value in ({"base": score} | variants).items()
    ]
    return {
        "model": {"id": "example/model", "total_parameters": 1000, "dtype": "bf16", "source": {"revision": "abc"}},
        "target": {"dataset_name": "NanoJMTEB", "dataset_id": "x/NanoJMTEB", "task_name": task, "split_name": task},
        "evaluation": {"aggregate_metric": "ndcg@10", "aggregate_metric_value": score, "embedding_evaluations": entries},
        "metrics": {},
    }


@pytest.fixture
def mteb(tmp_path: Path) -> Path:
    """A model that others scored on every task of a run, each at half of the baseline's score."""
    folder = tmp_path / "results" / "org__model" / "rev1"
    for task in Record.read(RUN).tasks:
        half = task.baseline / 2
        write(folder / f"{task.task}.json", mteb_result(task.task, half - 0.01, half + 0.01, metric=task.metric))
    write(
        folder / "model_meta.json", {"name": "org/model", "revision": "rev1", "memory_usage_mb": 10, "n_parameters": 5, "more": 1}
    )
    return tmp_path / "results"


def test_a_model_of_mteb_s_results_stands_in_the_set_of_the_runs_without_an_interval(mteb: Path) -> None:
    for place in (mteb, mteb / "org__model", mteb / "org__model" / "rev1"):
        told = payload([RUN], [place])
        (own,) = [run for run in told["runs"] if run["imported"]]
        assert own["group"] == 0
        assert own["kept"] == pytest.approx(0.5)  # subsets are averaged, then tasks, then divided by the baseline's mean
        assert own["low"] is own["high"] is own["speedup"] is own["verdict"] is None
        assert (own["model"], own["family"], own["bytes"], own["optimal"]) == ("org/model", "imported", 10 * 2**20, False)
        assert own["imported"] == {"source": "mteb", "revision": "rev1"}
        assert len(told["groups"]) == 1
        assert told["broken"] == {}


def test_a_model_that_lacks_a_task_has_a_set_of_its_own(mteb: Path) -> None:
    next((mteb / "org__model" / "rev1").glob("S*.json")).unlink()
    told = payload([RUN], [mteb])
    (own,) = [run for run in told["runs"] if run["imported"]]
    assert own["group"] == 1
    assert own["kept"] is None
    assert 0 < own["mean"] < 1
    assert told["groups"][1]["model"] == "imported"
    assert len(told["groups"][1]["tasks"]) == len(Record.read(RUN).tasks) - 1


def test_the_record_s_own_metric_counts_not_the_import_s_main_score(mteb: Path) -> None:
    for task in Record.read(RUN).tasks:
        content = mteb_result(task.task, task.baseline, metric=task.metric)
        content["scores"]["test"][0]["main_score"] = 0.001
        write(mteb / "org__model" / "rev1" / f"{task.task}.json", content)
    (own,) = [run for run in payload([RUN], [mteb])["runs"] if run["imported"]]
    assert own["kept"] == pytest.approx(1.0)


def test_a_size_that_is_not_known_is_not_guessed_and_one_from_parameters_says_so(mteb: Path) -> None:
    meta = mteb / "org__model" / "rev1" / "model_meta.json"
    write(meta, {"name": "org/model", "n_parameters": 5})
    (one,), _ = read_imported([mteb])
    assert (one.bytes, one.assumed) == (10, True)
    meta.unlink()
    (one,), _ = read_imported([mteb])
    assert (one.model, one.revision, one.bytes, one.assumed) == ("org/model", "rev1", None, False)


def test_hakari_s_variants_are_compared_with_their_own_model(tmp_path: Path) -> None:
    for task, score in (("A", 0.6), ("B", 0.4)):
        write(tmp_path / "example__model" / "x__NanoJMTEB" / f"{task}.json", hakari_result(task, score, int8=score * 0.9))
    write(tmp_path / "example__model" / "all.json", {"totals": {}})
    told = payload([RUN], [tmp_path])
    assert told["broken"] == {}
    own = {run["run"]: run for run in told["runs"] if run["imported"]}
    model, variant = own["HAKARI-Bench: example/model@abc"], own["HAKARI-Bench: example/model@abc (int8)"]
    assert model["group"] == variant["group"] == 1
    assert told["groups"][1]["tasks"] == ["NanoJMTEB/A", "NanoJMTEB/B"]
    assert (model["kept"], model["mean"], model["bytes"]) == (None, pytest.approx(0.5), 2000)
    assert variant["kept"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "neither a result of mteb"),
        (mteb_result("T", 62.1), "not between -1 and 1"),
        (mteb_result("T"), "no number as main_score"),
        (mteb_result("T", 0.5, split="dev") | {"scores": {"dev": [], "train": []}}, "of which none is test"),
        ({"task_name": 3, "scores": {}}, "task_name"),
        ({"target": {}, "evaluation": {}, "model": {}}, "dataset_name"),
        ([], "must hold a JSON object"),
    ],
)
def test_what_is_not_understood_is_named_and_the_rest_is_shown(tmp_path: Path, content: Any, said: str) -> None:
    write(tmp_path / "org__model" / "rev" / "Good.json", mteb_result("Good", 0.5))
    bad = write(tmp_path / "org__model" / "rev" / "Bad.json", content)
    found, broken = read_imported([tmp_path])
    assert [sorted(one.scores) for one in found] == [["Good"]]
    assert list(broken) == [str(bad)]
    assert said in broken[str(bad)]


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    assert read_imported([tmp_path, tmp_path / "none"])[1] == {
        str(tmp_path): "no results of mteb or HAKARI-Bench",
        str(tmp_path / "none"): "no such folder",
    }
