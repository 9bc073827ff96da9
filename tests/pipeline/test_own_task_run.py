"""A recipe with a task of the user's own, from end to end, and from any working directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compress.common.errors import UserError
from compress.data.texts import SUITE, read_jsonl
from compress.measure.accuracy.own_task import write_example
from compress.measure.evaluate import evaluate
from compress.measure.record import Record
from compress.pipeline import run as pipeline
from compress.pipeline.recipe_file import read_recipe
from compress.pipeline.run import run

RECIPE = """
model: MODEL
steps: [{method: rtn, bits: 4, activations: none}]
measure: {what: [], count: 24}
evaluate: {tasks: [./faq, MiniSTS]}
"""


@pytest.fixture
def recipe(bert: Path, tmp_path: Path) -> Path:
    """A recipe with a task next to it: the first 24 queries of the embedded suite."""
    folder = tmp_path / "project"
    write_example(folder / "faq", "retrieval")
    rows = read_jsonl(SUITE / "MiniRetrieval" / "queries.jsonl")[:24]
    (folder / "faq" / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(SUITE / "MiniRetrieval" / "corpus.jsonl", folder / "faq")
    graded = (SUITE / "MiniRetrieval" / "qrels" / "test.tsv").read_text().splitlines()
    known = {row["_id"] for row in rows}
    kept = [graded[0], *(line for line in graded[1:] if line.split("\t")[0] in known)]
    (folder / "faq" / "qrels.csv").write_text("\n".join(kept).replace("\t", ",") + "\n")
    path = folder / "small.yaml"
    path.write_text(RECIPE.replace("MODEL", str(bert)))
    return path


def test_a_run_judges_an_own_task(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    record = run(recipe, output="results", device="cpu", say=lambda _: None)
    task = record.tasks[0]
    assert [row.task for row in record.tasks] == ["faq", "MiniSTS"]
    assert (task.type, task.metric) == ("Retrieval", "ndcg_at_10")
    assert task.interval is not None
    assert task.interval.low <= task.delta <= task.interval.high
    assert task.interval.low < task.interval.high
    assert task.verdict in ("kept", "regressed", "inconclusive")
    assert set(task.index) == {"variant queries, baseline documents", "baseline queries, variant documents"}
    folder = Path("results") / record.run
    kept = json.loads((folder / "mteb" / "variant" / "faq.json").read_text())
    assert kept["scores"]["test"][0]["main_score"] == pytest.approx(task.variant)
    assert kept["dataset_revision"] == task.data
    assert Record.read(folder) == record

    # The run's own recipe finds the task from anywhere, and is the same run: so is one whose task has moved.
    said: list[str] = []
    assert run(folder / "recipe.yaml", output="results", device="cpu", say=said.append).tasks == record.tasks
    shutil.move(recipe.parent, tmp_path / "moved")
    moved = tmp_path / "moved" / "small.yaml"
    name = pipeline._Run(pipeline._override(read_recipe(moved), None, None, None, None), Path("results"), "cpu", print).name
    assert name == record.run

    # A changed file is other data, and so another run.
    qrels = moved.parent / "faq" / "qrels.csv"
    qrels.write_text(qrels.read_text().replace(",1\n", ",2\n", 1))
    changed = pipeline._Run(pipeline._override(read_recipe(moved), None, None, None, None), Path("results"), "cpu", print).name
    assert changed != record.run


def test_tasks_of_the_command_line_are_relative_to_where_it_runs(recipe: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recipe.parent)
    found = evaluate(str(bert), ["./faq"], say=lambda _: None)
    assert [row.task for row in found.tasks] == ["faq"]
    before = found.tasks[0]
    qrels = Path("faq") / "qrels.csv"
    lines = qrels.read_text().splitlines()
    qrels.write_text("\n".join(lines[:6]) + "\n")  # other queries: the score in the cache is not taken for theirs
    after = evaluate(str(bert), ["./faq"], say=lambda _: None).tasks[0]
    assert after.data != before.data
    assert after.variant != before.variant
    chosen = pipeline._override(read_recipe("small.yaml"), None, None, ["./faq", "mini"], None).evaluate.tasks
    assert chosen == (str(recipe.parent.resolve() / "faq"), "mini")


def test_a_recipe_whose_task_is_not_there_is_refused_before_anything_is_computed(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("./faq", "./fqa"))
    with pytest.raises(UserError, match=r"task .*/fqa: not a folder") as caught:
        run(recipe, output=tmp_path / "results", device="cpu")
    assert "faq" in caught.value.hint


def test_own_tasks_have_prompts_by_their_names(recipe: Path, bert: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("[./faq, MiniSTS]}", "[./faq], prompts: {faq-query: 'ask: ', faq-qery: x}}"))
    with pytest.raises(UserError, match="no task of this run looks for 'faq-qery'"):
        run(recipe, model=str(bert), output=tmp_path / "results", device="cpu")
    recipe.write_text(recipe.read_text().replace(", faq-qery: x}}", "}}"))
    record = run(recipe, model=str(bert), output=tmp_path / "results", device="cpu", say=lambda _: None)
    assert record.tasks[0].prompts == {"query": "ask: ", "document": ""}
