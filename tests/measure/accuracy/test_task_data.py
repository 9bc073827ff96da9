"""Local task data that cannot be scored is refused by file and line, before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest

from compress.common.errors import UserError
from compress.measure.accuracy.local_data import load_local
from compress.measure.accuracy.tasks import Task

Rows = Sequence[Mapping[str, Any]]
PAIRS = [{"sentence1": f"cat {number}", "sentence2": "a dog", "score": number % 5} for number in range(8)]
CLASSES = [{"text": f"text {number}", "label": number % 2} for number in range(8)]
DOCUMENTS = [{"_id": "d1", "text": "a"}, {"_id": "d2", "text": "b", "title": None}]
QUERIES = [{"_id": "q1", "text": "a"}]
HEADING = "query-id\tcorpus-id\tscore\n"


def write(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def loaded(name: str, data: Path) -> Task:
    """Load a task by name; `find_tasks` would read the lists of all benchmarks first."""
    task = mteb.get_task(name)
    load_local(task, data / name)
    return Task(task, data / name)


def changed(rows: Rows, index: int, **changes: Any) -> Rows:
    return [{**row, **changes} if number == index else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (changed(PAIRS, 5, score=None), "line 6: 'score' must be a finite number, got None"),
        (changed(PAIRS, 5, score="x"), "line 6: 'score' is of type str, and in line 1 float"),
        ([{**row, "score": str(row["score"])} for row in PAIRS], "line 1: 'score' must be a finite number, got '0'"),
        (changed(PAIRS, 5, score=float("nan")), "line 6: NaN is not a number"),
        (changed(PAIRS, 5, score=[1]), "line 6: 'score' is of type list"),
        (changed(PAIRS, 5, sentence1=None), "line 6: 'sentence1' is null, not a string"),
        (changed(PAIRS, 5, sentence1=5), "line 6: 'sentence1' is of type float, and in line 1 str"),
        ([{**row, "sentence2": 5} for row in PAIRS], "line 1: 'sentence2' is int, not a string"),
        (changed(PAIRS, 5, sentence1="\ud800"), "line 6: 'sentence1' holds half of a surrogate pair"),
        ([{**row, "score": 2} for row in PAIRS], "'score' is 2.0 in all of 8 rows"),
        (PAIRS[:1], "'score' is 0.0 in all of 1 rows"),
    ],
)
def test_pairs_with_scores(tmp_path: Path, rows: Rows, message: str) -> None:
    write(tmp_path / "STSBenchmark" / "test.jsonl", rows)
    with pytest.raises(UserError, match=rf"STSBenchmark/test\.jsonl.*{message}"):
        loaded("STSBenchmark", tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (None, CLASSES, r"no train\.jsonl, on which Banking77Classification fits its classifier"),
        ([{**row, "label": 0} for row in CLASSES], CLASSES, r"train\.jsonl: 'label' is 0 in all of 8 rows"),
        (CLASSES, changed(CLASSES, 3, label=7), r"test\.jsonl, line 4: 'label' is 7, a label that no row of train\.jsonl has"),
        ([{**row, "label": str(row["label"])} for row in CLASSES], CLASSES, r"line 1: 'label' is 0, a label that no row"),
        (CLASSES, changed(CLASSES, 3, label="1"), r"test\.jsonl, line 4: 'label' is of type str, and in line 1 float"),
        (changed(CLASSES, 2, label=None), CLASSES, r"train\.jsonl, line 3: 'label' must be an integer or a string, got null"),
        (CLASSES, changed(CLASSES, 2, text=None), r"test\.jsonl, line 3: 'text' is null"),
    ],
)
def test_classes(tmp_path: Path, train: Rows | None, test: Rows, message: str) -> None:
    folder = tmp_path / "Banking77Classification"
    write(folder / "test.jsonl", test)
    if train is not None:
        write(folder / "train.jsonl", train)
    with pytest.raises(UserError, match=message):
        loaded("Banking77Classification", tmp_path)


@pytest.mark.parametrize(
    ("documents", "queries", "qrels", "message"),
    [
        (DOCUMENTS, QUERIES, HEADING, r"test\.tsv: grades no document of any query"),
        (DOCUMENTS, QUERIES, HEADING + "q1\td1\t0\n", r"test\.tsv: no grade is above 0"),
        (DOCUMENTS, QUERIES, HEADING + "q1\td1\t--1\n", r"test\.tsv, line 2: expected"),
        (DOCUMENTS, QUERIES, HEADING + "q1\td1\t\u00b2\n", r"test\.tsv, line 2: expected"),
        (
            DOCUMENTS,
            QUERIES,
            HEADING + "q" * 200_000 + "\td1\t1\n",
            r"test\.tsv, line 2: field larger than field limit|is not in its",
        ),
        (
            [DOCUMENTS[0], DOCUMENTS[0]],
            QUERIES,
            HEADING + "q1\td1\t1\n",
            r"corpus\.jsonl, line 2: '_id' 'd1' is that of line 1 too",
        ),
        (DOCUMENTS, [*QUERIES, *QUERIES], HEADING + "q1\td1\t1\n", r"queries\.jsonl, line 2: '_id' 'q1' is that of line 1 too"),
        (changed(DOCUMENTS, 1, text=None), QUERIES, HEADING + "q1\td1\t1\n", r"corpus\.jsonl, line 2: 'text' is null"),
        (changed(DOCUMENTS, 1, title=5), QUERIES, HEADING + "q1\td1\t1\n", r"corpus\.jsonl, line 2: 'title' is int"),
        (DOCUMENTS, changed(QUERIES, 0, text=7), HEADING + "q1\td1\t1\n", r"queries\.jsonl, line 1: 'text' is int"),
    ],
)
def test_retrieval(tmp_path: Path, documents: Rows, queries: Rows, qrels: str, message: str) -> None:
    folder = tmp_path / "SciFact"
    write(folder / "corpus.jsonl", documents)
    write(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(qrels)
    with pytest.raises(UserError, match=message):
        loaded("SciFact", tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "a", "positive": "b", "negative": ["c"]}, "line 1: 'positive' must be a list of texts, got 'b'"),
        ({"query": None, "positive": ["b"], "negative": ["c"]}, "line 1: 'query' is null"),
        ({"query": "a", "positive": [], "negative": ["c"]}, "no grade is above 0"),
    ],
)
def test_reranking(tmp_path: Path, row: Mapping[str, Any], message: str) -> None:
    write(tmp_path / "AskUbuntuDupQuestions" / "test.jsonl", [row])
    with pytest.raises(UserError, match=rf"test\.jsonl.*{message}"):
        loaded("AskUbuntuDupQuestions", tmp_path)


def test_pairs_of_one_kind_and_labels_that_are_none(tmp_path: Path) -> None:
    row = {"sent1": ["a", "b", "c"], "sent2": ["d", "e", "f"], "labels": [1, 1, 1]}
    for changes, message in (
        ({}, "'labels' is 1 in all of 3 rows"),
        ({"labels": [1, 0, 2]}, "'labels' must be 0 or 1, got 2"),
        ({"labels": [1, 0]}, "'labels' and the texts of the row are lists of different lengths"),
        ({"sent2": ["d", None, "f"]}, "'sent(ence)?2' is null"),
    ):
        given = [{**row, **changes}]
        write(tmp_path / "TwitterURLCorpus" / "test.jsonl", given)
        with pytest.raises(UserError, match=rf"test\.jsonl.*{message}"):
            loaded("TwitterURLCorpus", tmp_path)


def test_a_folder_of_no_subset_is_not_passed_over(tmp_path: Path) -> None:
    for subset in ("en", "zz"):
        for split in ("train", "test"):
            write(tmp_path / "AmazonCounterfactualClassification" / subset / f"{split}.jsonl", CLASSES)
    with pytest.raises(UserError, match="zz: AmazonCounterfactualClassification has no subset of this name"):
        loaded("AmazonCounterfactualClassification", tmp_path)


def test_sound_data_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "STSBenchmark" / "test.jsonl", PAIRS)
    for split in ("train", "test"):
        write(tmp_path / "Banking77Classification" / f"{split}.jsonl", CLASSES)
    assert len(loaded("STSBenchmark", tmp_path).mteb.dataset["test"]) == len(PAIRS)
    assert len(loaded("Banking77Classification", tmp_path).mteb.dataset["train"]) == len(CLASSES)


def test_a_score_that_is_no_number_ends_the_evaluation(tmp_path: Path) -> None:
    from compress.measure.accuracy.score import score_task
    from compress.runtimes.loading import load

    write(tmp_path / "STSBenchmark" / "test.jsonl", PAIRS)
    task = loaded("STSBenchmark", tmp_path)
    embedder = load("nano")
    embedder.encode = lambda texts, *_, **__: np.ones((len(texts), embedder.dimension), dtype=np.float32)  # type: ignore[method-assign, assignment]
    with pytest.raises(UserError, match="task 'STSBenchmark': cosine_spearman is nan"):
        score_task(embedder, task)
