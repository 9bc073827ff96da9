"""Tasks of the user's own: what each type scores, in which formats, and how everything that is wrong is refused."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import v_measure_score

from compress.common.errors import UserError
from compress.measure.accuracy.local_data import load_local
from compress.measure.accuracy.own_check import check_own
from compress.measure.accuracy.own_data import CLASSES, load_own
from compress.measure.accuracy.own_task import TYPES, read_own_task, resolved, write_example
from compress.measure.accuracy.paired import score_interval
from compress.measure.accuracy.score import TaskScore, score_task
from compress.measure.accuracy.statistics import score
from compress.measure.accuracy.tasks import Task, find_tasks
from compress.models.text.spec import EmbedderSpec

Rows = Sequence[Mapping[str, Any]]


class Angles:
    """An embedder whose texts are angles in degrees: `name@30`. The cosine of two falls with their distance."""

    name, dimension, spec = "angles", 2, EmbedderSpec()

    def encode(self, texts: Any, prompt: str | None = None, **_: Any) -> np.ndarray:
        angles = np.radians([float(text.strip().rpartition("@")[2]) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def as_jsonl(path: Path, rows: Rows) -> None:
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_gzip(path: Path, rows: Rows) -> None:
    with gzip.open(path.with_suffix(".jsonl.gz"), "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def as_csv(path: Path, rows: Rows, suffix: str = ".csv", separator: str = ",") -> None:
    with path.with_suffix(suffix).open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        table.writeheader()
        table.writerows(rows)


def as_tsv(path: Path, rows: Rows) -> None:
    as_csv(path, rows, ".tsv", "\t")


def as_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path.with_suffix(".parquet"))


FORMATS = {"jsonl": as_jsonl, "jsonl.gz": as_gzip, "csv": as_csv, "tsv": as_tsv, "parquet": as_parquet}

# Documents from the nearest to the farthest of q1 (at 0): d1 0, d2 grade 2, d3 0, d4 grade 1. q2 finds its only one first.
SEARCH = {
    "corpus": [{"_id": f"d{rank}", "text": f"d@{10 * rank}"} for rank in (1, 2, 3, 4)],
    "queries": [{"_id": "q1", "text": "q@0"}, {"_id": "q2", "text": "q@90"}, {"_id": "q3", "text": "q@45"}],
    "qrels": [
        {"query-id": "q1", "corpus-id": "d2", "score": 2},
        {"query-id": "q1", "corpus-id": "d4", "score": 1},
        {"query-id": "q2", "corpus-id": "d4", "score": 1},
    ],
}
NDCG = ((2 / math.log2(3) + 1 / math.log2(5)) / (2 / math.log2(2) + 1 / math.log2(3)) + 1) / 2
# Cosines of the pairs fall in the order 1, 3, 2, 4; gold falls in the order 1, 2, 3, 4: 1 - 6 * 2 / (4 * 15).
STS = {
    "test": [
        {"sentence1": "a@0", "sentence2": f"b@{angle}", "score": gold}
        for angle, gold in ((5, 4.5), (40, 3), (20, 2), (60, 0.5))
    ]
}  # fmt: skip
# Nearest first: 1, 0, 1, 0.
PAIRS = {
    "test": [
        {"sentence1": "a@0", "sentence2": f"b@{angle}", "labels": label} for angle, label in ((5, 1), (20, 0), (40, 1), (60, 0))
    ]
}
# Two classes far from each other; the last text to classify lies with the other class.
CLASSES_APART = {
    "train": [{"text": f"t@{angle}", "label": "far" if angle > 90 else "near"} for angle in (0, 5, 10, 170, 175, 180)],
    "test": [
        {"text": f"s@{angle}", "label": label} for angle, label in ((1, "near"), (8, "near"), (172, "far"), (178, "near"))
    ],
}  # fmt: skip
# k-means puts the first three together, of which one has the other label.
GROUPS = {"test": [{"sentences": f"s@{angle}", "labels": label} for angle, label in ((0, "a"), (1, "a"), (2, "b"), (170, "b"))]}
# Relevant passages at the ranks 2 and 3 of 3, and at 1 of 2.
RERANKED = {
    "test": [
        {"query": "q@0", "positive": ["p@20", "p@30"], "negative": ["n@10"]},
        {"query": "q@90", "positive": ["p@80"], "negative": ["n@10"]},
    ]
}
CASES: Mapping[str, tuple[Mapping[str, Rows], float]] = {
    "retrieval": (SEARCH, NDCG),
    "sts": (STS, 0.8),
    "pairs": (PAIRS, (1 + 2 / 3) / 2),
    "classification": (CLASSES_APART, 0.75),
    "clustering": (GROUPS, v_measure_score([0, 0, 1, 1], [0, 0, 0, 1])),
    "reranking": (RERANKED, ((1 / 2 + 2 / 3) / 2 + 1) / 2),
}
"""Data of each type and the score that it has by hand."""

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a task: `make(type, files, format, more lines of task.yaml)`."""

    def written(type: str, files: Mapping[str, Rows] | None = None, format: str = "jsonl", more: str = "") -> Path:
        folder = tmp_path / "my-task"
        folder.mkdir(exist_ok=True)
        (folder / "task.yaml").write_text(f"type: {type}\nlanguage: eng-Latn\n{more}")
        for stem, rows in (CASES[type][0] if files is None else files).items():
            FORMATS[format](folder / stem, rows)
        return folder

    return written


def loaded(folder: Path) -> Task:
    """Load a task; `find_tasks` would read the names of all public ones first."""
    own = read_own_task(folder)
    return Task(load_own(own), own.folder, own.files)


def scored(folder: Path) -> TaskScore:
    return score_task(Angles(), loaded(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize("type", TYPES)
def test_each_type_has_the_score_that_it_has_by_hand(make: Make, type: str) -> None:
    found = scored(make(type))
    # Clusters are those of texts drawn with replacement, 16,384 of four.
    assert found.score == pytest.approx(CASES[type][1], abs=0.02 if type == "clustering" else 1e-5)
    assert (found.task, found.type, found.metric) == ("my-task", TYPES[type].mteb, TYPES[type].metrics[0])
    assert score(found.examples.parts[0].statistic()) == pytest.approx(found.score, abs=1e-5)
    assert score_interval(found) is not None
    assert found.mteb["dataset_revision"] == found.data
    assert next(iter(found.mteb["scores"]["test"]))["languages"] == ["eng-Latn"]


def test_every_type_has_a_class_and_an_example() -> None:
    assert list(CLASSES) == list(TYPES)
    assert {kind: CASES[kind] for kind in TYPES}.keys() == CASES.keys()


@pytest.mark.parametrize("metric", ["mrr_at_10", "mrr_at_1", "recall_at_1", "hit_rate_at_3", "precision_at_3", "map_at_1000"])
def test_metrics_of_retrieval_by_hand(make: Make, metric: str) -> None:
    by_hand = {
        "mrr_at_10": (1 / 2 + 1) / 2,
        "mrr_at_1": 1 / 2,
        "recall_at_1": 1 / 2,
        "hit_rate_at_3": 1,
        "precision_at_3": (1 / 3 + 1 / 3) / 2,
        "map_at_1000": ((1 / 2 + 2 / 4) / 2 + 1) / 2,
    }
    found = scored(make("retrieval", more=f"metric: {metric}\n"))
    assert found.score == pytest.approx(by_hand[metric], abs=1e-5)
    assert score(found.examples.parts[0].statistic()) == pytest.approx(found.score, abs=1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("type", ["retrieval", "sts", "pairs", "classification"])
def test_formats_are_the_same_data(make: Make, type: str, format: str) -> None:
    assert scored(make(type, format=format)).score == pytest.approx(CASES[type][1], abs=1e-5)


def test_reranking_of_shared_documents(make: Make) -> None:
    ranked = [{"query-id": "q1", "corpus-ids": ["d3", "d4"]}, {"query-id": "q2", "corpus-ids": ["d1", "d4"]}]
    found = scored(make("reranking", {**SEARCH, "top_ranked": ranked}))
    assert found.score == pytest.approx((1 / 2 / 2 + 1) / 2, abs=1e-5)  # d4 is second of two; d2 is not listed and not found
    with pytest.raises(UserError, match=r"query 'q2' has grades, and top_ranked has no documents for it"):
        loaded(make("reranking", {**SEARCH, "top_ranked": ranked[:1]}))


def test_labels_that_are_numbers_or_texts_score_the_same(make: Make) -> None:
    """mteb's average precision of two classes fails on texts; a task with three has none."""
    numbered = {split: [{**row, "label": int(row["label"] == "near")} for row in rows] for split, rows in CLASSES_APART.items()}
    by_text, by_number = scored(make("classification")), scored(make("classification", numbered))
    of_text, of_number = (next(iter(found.mteb["scores"]["test"])) for found in (by_text, by_number))
    assert of_text["scores_per_experiment"] == of_number["scores_per_experiment"]
    assert of_text["ap"] > 0.5


def test_a_public_task_takes_two_labels_that_are_texts(tmp_path: Path) -> None:
    for split, rows in CLASSES_APART.items():
        as_jsonl(tmp_path / split, rows)
    task = mteb.get_task("ImdbClassification")
    load_local(task, tmp_path)
    assert score_task(Angles(), Task(task, tmp_path)).score == pytest.approx(0.75)  # type: ignore[arg-type]


def changed(stem: str, index: int, base: Mapping[str, Rows] = SEARCH, **changes: Any) -> dict[str, Rows]:
    rows = [{**row, **changes} if number == index else row for number, row in enumerate(base[stem])]
    return {**base, stem: [{key: value for key, value in row.items() if value != "LEAVE OUT"} for row in rows]}


@pytest.mark.parametrize(
    ("type", "files", "format", "message", "hint"),
    [
        ("retrieval", changed("corpus", 1, _id="d1"), "jsonl", r"corpus\.jsonl, line 2: '_id' 'd1' is that of line 1 too", ""),
        ("retrieval", changed("queries", 1, _id="q1"), "csv", r"queries\.csv, line 3: '_id' 'q1' is that of line 2 too", ""),
        ("retrieval", changed("corpus", 1, _id="d1"), "parquet", r"corpus\.parquet, row 2: '_id' 'd1' is that of row 1 too", ""),
        ("retrieval", changed("qrels", 0, **{"query-id": "q9"}), "jsonl", r"qrels\.jsonl, line 1: query 'q9' is not in its", ""),
        ("retrieval", changed("qrels", 2, **{"corpus-id": "d9"}), "csv", r"qrels\.csv, line 4: document 'd9' is not in its", ""),
        ("retrieval", changed("qrels", 1, score="good"), "csv", r"qrels\.csv, line 3: 'score' must be a whole number, got 'good'", ""),
        ("retrieval", changed("qrels", 1, score=0.5), "parquet", r"qrels\.parquet, row 2: 'score' must be a whole number, got 0.5", ""),
        ("retrieval", {**SEARCH, "qrels": []}, "jsonl", r"qrels\.jsonl: has no rows", ""),
        ("retrieval", {**SEARCH, "qrels": [{**row, "score": 0} for row in SEARCH["qrels"]]}, "csv", "no grade is above 0", ""),
        (
            "retrieval",
            {**SEARCH, "qrels": [*SEARCH["qrels"], {**SEARCH["qrels"][0], "score": 1}]},
            "csv",
            r"line 5: query 'q1' and document 'd2' have the grade 2 too",
            "",
        ),
        ("retrieval", changed("corpus", 2, text="LEAVE OUT", txt="x"), "jsonl", r"line 3: lacks 'text'", "rename 'txt' to 'text'"),
        (
            "retrieval",
            {**SEARCH, "corpus": [{"id": "d1", "text": "d@1"}]},
            "csv",
            r"corpus\.csv, line 1: has no column '_id'",
            "rename 'id' to '_id'",
        ),
        ("retrieval", {key: SEARCH[key] for key in ("corpus", "queries")}, "csv", "retrieval needs a file qrels", "query-id, corpus-id"),
        ("retrieval", {**SEARCH, "qrel": SEARCH["qrels"]}, "csv", r"qrel\.csv: retrieval has no file of this name", "mean 'qrels'"),
        ("sts", changed("test", 1, STS, score="good"), "csv", r"test\.csv, line 3: 'score' must be a number, got 'good'", ""),
        ("sts", changed("test", 1, STS, score="3,5"), "csv", r"test\.csv, line 3: 'score' must be a number, got '3,5'", ""),
        ("sts", changed("test", 1, STS, score=None), "jsonl", r"test\.jsonl, line 2: 'score' must be a finite number", ""),
        ("sts", {"test": [{**row, "score": 1} for row in STS["test"]]}, "parquet", r"test\.parquet: 'score' is 1", ""),
        ("sts", {"tests": STS["test"]}, "csv", r"tests\.csv: sts has no file of this name", "did you mean 'test'?"),
        ("pairs", changed("test", 2, PAIRS, labels=2), "csv", r"test\.csv, line 4: 'labels' must be 0 or 1", ""),
        ("pairs", {"test": [{"sentence1": "a", "sentence2": "b", "label": 1}]}, "csv", "has no column 'labels'", "rename 'label'"),
        (
            "pairs",
            {"test": [{"sentence1": "a", "sentence2": "b", "label": 1}]},
            "parquet",
            r"test\.parquet: has no column 'labels'",
            "rename 'label'",
        ),
        ("classification", changed("test", 1, CLASSES_APART, label="nearr"), "csv", r"test\.csv, line 3: 'label' is 'nearr'", ""),
        ("classification", changed("train", 1, CLASSES_APART, label=1), "jsonl", r"train\.jsonl, line 2: 'label' is of type float", ""),
        ("classification", {"test": CLASSES_APART["test"]}, "csv", "classification needs a file train", "the columns text, label"),
        ("clustering", {"test": [{**row, "labels": "a"} for row in GROUPS["test"]]}, "csv", "'labels' is 'a' in all of 4 rows", ""),
        ("clustering", {"test": [{"sentences": "a"}]}, "jsonl", r"test\.jsonl, line 1: lacks 'labels'", ""),
        ("reranking", RERANKED, "csv", "'positive' must be a list of texts", ""),
        ("reranking", SEARCH, "jsonl", "reranking needs a file top_ranked", "query-id, corpus-ids"),
    ],
)  # fmt: skip
def test_faulty_data_is_named_by_file_and_line(
    make: Make, type: str, files: Mapping[str, Rows], format: str, message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        loaded(make(type, files, format))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\nok,a\n"two "words"",b\n', r"train\.csv, line 3: ',' expected after '\"'"),
        ('text,label\nok,a\n"never closed,b\nlast,a\n', r"train\.csv, line 3: a quote is opened and never closed"),
        ("text,label\nok,a\none, two,b\n", r"train\.csv, line 3: has 3 columns, line 1 has 2"),
        ("text,label\nok\n", r"train\.csv, line 2: has 1 columns, line 1 has 2"),
        ("text,text\nok,a\n", r"train\.csv, line 1: column 2 is named 'text', as another one is"),
        ("text,label,\nok,a,\n", r"train\.csv, line 1: column 3 has no name"),
        ("", r"train\.csv: has no rows"),
        ("text,label\n", r"train\.csv: has no rows"),
    ],
)
def test_a_broken_csv_is_named_by_line(make: Make, content: str, message: str) -> None:
    folder = make("classification", format="csv")
    (folder / "train.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        loaded(folder)


def test_values_of_a_csv_may_span_lines(make: Make) -> None:
    folder = make("classification", format="csv")
    (folder / "train.csv").write_text('text,label\n"t\n@1",a\n"t ""quoted"", yes @180",b\n')
    (folder / "test.csv").write_text('text,label\n"t\n@1",a\n\n"t\n@180",c\n')
    with pytest.raises(UserError, match=r"test\.csv, line 5: 'label' is 'c', a label that no row of train\.csv has"):
        loaded(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("type: retreival\nlanguage: eng", "task.yaml, line 1: type: unknown type 'retreival'; did you mean 'retrieval'?"),
        ("type: sts\nlanguage: eng\nmetric: ndcg_at_10", "line 3: metric: sts is not scored by 'ndcg_at_10'; known: cosine_spearman"),
        ("type: retrieval\nlanguage: eng\nmetric: ndcg_at_7", "line 3: metric: retrieval is not scored by 'ndcg_at_7'; did you mean 'ndcg_at_"),
        ("type: retrieval\nlanguage: de", "line 2: language: 'de' is not of the form eng or eng-Latn"),
        ("type: retrieval\nlanguage: xqx", "line 2: language: 'xqx' is not a language of ISO 639-3"),
        ("type: retrieval\nlanguage: eng-Latt", "line 2: language: 'Latt' is not a script of ISO 15924"),
        ("type: retrieval\nlangauge: eng", "langauge: unknown key 'langauge'; did you mean 'language'?"),
        ("type: retrieval", "language: field required"),
        ("type: retrieval\nlanguage: eng\nname: my task", "line 3: name: 'my task' is no name"),
        ("type: [a\n", "not YAML"),
        ("retrieval", "task.yaml: task.yaml of a task is a mapping"),
        ("type: 3\nlanguage: eng", "line 1: type: input should be a valid string, got 3"),
    ],
)  # fmt: skip
def test_a_faulty_task_file_is_named_by_line_and_key(make: Make, content: str, message: str) -> None:
    folder = make("retrieval")
    (folder / "task.yaml").write_text(content)
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert message in "\n".join((caught.value.message, caught.value.hint))


def test_a_folder_that_is_none_names_what_is_near(make: Make, tmp_path: Path) -> None:
    folder = make("sts")
    with pytest.raises(UserError, match="not a folder") as caught:
        read_own_task(tmp_path / "my-tsk")
    assert "my-task" in caught.value.hint
    (folder / "task.yaml").rename(folder / "tasks.yml")
    with pytest.raises(UserError, match=r"has no task\.yaml") as caught:
        read_own_task(folder)
    assert caught.value.hint == "rename tasks.yml to task.yaml"


def test_other_files_are_passed_over_unless_they_look_like_data(make: Make) -> None:
    folder = make("sts")
    (folder / "README.md").write_text("about these pairs")
    (folder / ".DS_Store").write_bytes(b"\0")
    before = loaded(folder).fingerprint
    (folder / "README.md").write_text("more about these pairs")
    assert loaded(folder).fingerprint == before
    (folder / "test.xlsx").write_bytes(b"")
    with pytest.raises(UserError, match=r"test\.xlsx: this format is not read"):
        loaded(folder)
    (folder / "test.xlsx").rename(folder / "notes.xlsx")
    (folder / "test.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    with pytest.raises(UserError, match=r"there is test\.jsonl too"):
        loaded(folder)


@pytest.mark.parametrize("name", ["test.jsonl", "task.yaml"])
def test_a_changed_file_is_other_data(make: Make, name: str) -> None:
    folder = make("sts")
    before = loaded(folder).fingerprint
    path = folder / name
    path.write_text(path.read_text().replace("4.5", "4.4").replace("eng-Latn", "eng"))
    assert loaded(folder).fingerprint != before


def test_names_that_public_tasks_have_are_refused(make: Make, tmp_path: Path) -> None:
    folder = make("sts")
    assert [task.name for task in find_tasks([str(folder), f"{folder}/"], None)] == ["my-task"]
    for name, of in (("SciFact", "taken"), ("STS", "taken"), ("mini", "taken")):
        (folder / "task.yaml").write_text(f"type: sts\nlanguage: eng\nname: {name}\n")
        with pytest.raises(UserError, match=f"its name '{name}' is {of}") as caught:
            find_tasks([str(folder)], None)
        assert "'name' of its task.yaml" in caught.value.hint
    (folder / "task.yaml").write_text("type: sts\nlanguage: eng\n")
    shutil.copytree(folder, tmp_path / "other" / "my-task")
    with pytest.raises(UserError, match=f"its name 'my-task' is that of {folder}"):
        find_tasks([str(folder), str(tmp_path / "other" / "my-task")], None)


def test_a_folder_that_is_named_as_a_task_is_pointed_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make("sts").parent)
    with pytest.raises(UserError, match="unknown task 'my-task'") as caught:
        find_tasks(["my-task"], None)
    assert caught.value.hint == "a folder with a task is named ./my-task"


def test_paths_are_relative_to_a_folder() -> None:
    assert resolved(["./a", "../b", "/c", "mini", "MTEB(eng, v2)"], Path("/x/y")) == (
        "/x/y/a",
        "/x/b",
        "/c",
        "mini",
        "MTEB(eng, v2)",
    )


@pytest.mark.parametrize("type", TYPES)
def test_the_example_of_each_type_is_right_as_it_stands(tmp_path: Path, type: str) -> None:
    files = write_example(tmp_path / "my-task", type)
    assert {path.name for path in files} == {path.name for path in (tmp_path / "my-task").iterdir()}
    said = check_own(tmp_path / "my-task")
    assert said.startswith(f"my-task: {type} in eng, scored by {TYPES[type].metrics[0]}\n")
    with pytest.raises(UserError, match="is not empty"):
        write_example(tmp_path / "my-task", type)


def test_check_says_what_is_in_a_task(make: Make) -> None:
    said = check_own(make("retrieval"))
    assert "4 documents\n" in said
    assert "2 queries, with 3 grades, 3 of them above 0\n" in said
    assert "1 queries without a grade, which are left out" in said
    shutil.rmtree(make("retrieval"))
    assert "test: 4 rows, 2 labels" in check_own(make("classification"))
