"""Task data from a local folder: `<task>[/<subset>]/<split>.jsonl[.gz]` with the hub's columns; retrieval in BEIR's layout.

CSV, TSV and Parquet are read in place of JSON lines.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)

from compress.common.errors import UserError, nearest
from compress.data.tables import SUFFIXES, Row, find_table, is_text, place_of, read_table, suffix_of, tables_in, unit_of
from compress.data.texts import check_text, read_lines
from compress.measure.accuracy.data_checks import Rows, check_relevant, check_rows, check_unique

ALSO = f"{', '.join(SUFFIXES[2:])} are read too"
QRELS = ("query-id", "corpus-id", "score")
# A grade fits into the 64 bits of mteb's scorer.
_GRADE = re.compile(r"-?[0-9]{1,9}")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def fingerprint_of(folder: Path, files: Iterable[Path]) -> str:
    """Return a hash of files and of their places in a folder, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def load_local(task: AbsTask, folder: Path, columns: tuple[str, ...] = ()) -> None:
    """Load the data of a local folder into a task. The task keeps only the subsets and splits that the folder has.

    Args:
        task: the task.
        folder: the folder.
        columns: columns that each file of a split must have; those of public tasks may be renamed by the task.

    Raises:
        UserError: the folder has none of the task's subsets or splits, or a file is faulty.
    """
    present = [subset for subset in task.hf_subsets if (folder / subset).is_dir()]
    if not present and len(task.hf_subsets) == 1:
        present = list(task.hf_subsets)
    if not present:
        raise UserError(f"{folder}: has none of the subsets of {task.metadata.name}: {', '.join(task.hf_subsets[:8])}")
    load = _load_retrieval if isinstance(task, AbsTaskRetrieval) else partial(_load_splits, columns=columns)
    places = {subset: folder / subset if (folder / subset).is_dir() else folder for subset in present}
    _check_folders(task, folder)
    loaded = {subset: load(task, place) for subset, place in places.items()}
    task.hf_subsets = present
    if isinstance(task, AbsTaskRetrieval) or task.metadata.is_multilingual:
        task.dataset = loaded
    else:
        task.dataset = loaded[present[0]]
    try:
        task.dataset_transform()
    except Exception as error:  # the task's own code, which takes the data of the hub for granted
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise UserError(
            f"{folder}: {task.metadata.name} does not take this data ({why})", "its columns are those of the hub"
        ) from error
    task.data_loaded = True
    if not isinstance(task, AbsTaskRetrieval):
        _check_columns(task, folder)
        for subset, place in places.items():
            splits = task.dataset[subset] if task.metadata.is_multilingual else task.dataset
            check_rows(task, _places(splits, place))
            if isinstance(task, AbsTaskClassification):
                _encode_labels(task, splits)
    splits = [split for split in task.metadata.eval_splits if all(split in splits for splits in loaded.values())]
    if not splits:
        raise UserError(
            f"{folder}: has none of the splits that {task.metadata.name} is scored on: {', '.join(task.metadata.eval_splits)}"
        )
    task.filter_eval_splits(published_splits(splits))


def published_splits(splits: list[str]) -> list[str]:
    """Return the splits that scores are published for: only `test` if there is one, as in mteb's benchmarks."""
    return ["test"] if "test" in splits else splits


def _file(folder: Path, stem: str) -> Path:
    found = find_table(folder, stem)
    if found is None:
        raise UserError(f"{folder}: no {stem}.jsonl or {stem}.jsonl.gz", ALSO)
    return found


def _load_splits(task: AbsTask, folder: Path, columns: tuple[str, ...]) -> DatasetDict:
    required = columns
    if isinstance(task, AbsTaskSTS):
        required = (*task.column_names, "score")
    elif isinstance(task, AbsTaskClassification):
        required = (task.input_column_name, task.label_column_name)
    files = tables_in(folder)
    if not files:
        raise UserError(f"{folder}: holds no <split>.jsonl or <split>.jsonl.gz", ALSO)
    return DatasetDict({split: _table(path, _typed(task, path, read_table(path, required))) for split, path in files.items()})


def _typed(task: AbsTask, path: Path, rows: Sequence[Row]) -> Sequence[Row]:
    """Return rows with the numbers of a task's scores; a format without types has them as texts.

    Raises:
        UserError: one is no number.
    """
    column = "score" if isinstance(task, AbsTaskSTS) else None
    if isinstance(task, (AbsTaskPairClassification, AbsTaskRegression)):
        column = task.label_column_name
    if column is None or not is_text(path):
        return rows
    for number, row in rows:
        if column in row and not _NUMBER.fullmatch(row[column].strip()):
            raise UserError(f"{place_of(path, number)}: {column!r} must be a number, got {row[column]!r}")
    return [(number, {**row, column: float(row[column])} if column in row else row) for number, row in rows]


def _places(splits: Any, folder: Path) -> dict[str, Rows]:
    """Return the rows of each split with the file that they were read from."""
    return {split: Rows(splits[split], path) for split, path in tables_in(folder).items() if split in splits}


def _table(path: Path, rows: Sequence[tuple[int, dict[str, Any]]]) -> Dataset:
    """Return rows as a table.

    Raises:
        UserError: a column holds values of different types; names the line of the first one that differs.
    """
    try:
        return Dataset.from_list([row for _, row in rows])
    except (pyarrow.ArrowException, OverflowError, TypeError, UnicodeEncodeError, ValueError) as error:
        kinds: dict[str, tuple[type, int]] = {}
        for number, row in rows:
            for key, value in row.items():
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str):
                        check_text(text, f"{place_of(path, number)}: {key!r}")
                kind = float if type(value) is int else type(value)
                known, first = kinds.setdefault(key, (kind, number)) if value is not None else (kind, number)
                if kind is not known:
                    names = f"{kind.__name__}, and in {unit_of(path)} {first} {known.__name__}"
                    raise UserError(f"{place_of(path, number)}: {key!r} is of type {names}") from error
        raise UserError(f"{path}: its rows make no table ({str(error).splitlines()[0][:120]})") from error


def _encode_labels(task: AbsTaskClassification, splits: Any) -> None:
    """Replace labels that are texts by numbers in the order of the texts, as a classifier orders its classes.

    mteb's average precision of two classes takes 1 for the positive one and fails on texts.
    """
    column = task.label_column_name
    used = [split for split in {task.train_split, *task.metadata.eval_splits} if split in splits]
    labels = {split: list(splits[split][column]) for split in used}
    known = {label for values in labels.values() for label in values if isinstance(label, str)}
    if not known or not all(isinstance(label, str) for values in labels.values() for label in values):
        return
    codes = {label: code for code, label in enumerate(sorted(known))}
    for split, values in labels.items():
        coded = [codes[label] for label in values]
        splits[split] = splits[split].remove_columns(column).add_column(column, coded)


def _check_folders(task: AbsTask, folder: Path) -> None:
    """See that no folder holds data of a subset that the task does not have, which would be left out without a word.

    Raises:
        UserError: one does.
    """
    known = {*task.metadata.hf_subsets, *task.hf_subsets, "qrels", "top_ranked"}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith(".") and path.name not in known:
            raise UserError(f"{path}: {task.metadata.name} has no subset of this name", nearest(path.name, known - {"qrels"}))


def _check_columns(task: AbsTask, folder: Path) -> None:
    """Check that the data, after the task's own renaming, has the columns that the task is scored on.

    Raises:
        UserError: one is missing.
    """
    kinds: dict[type[AbsTask], tuple[str, ...]] = {
        AbsTaskSTS: (*getattr(task, "column_names", ()), "score"),
        AbsTaskClassification: ("input_column_name", "label_column_name"),
        AbsTaskPairClassification: ("input1_column_name", "input2_column_name", "label_column_name"),
        AbsTaskClustering: ("input_column_name", "label_column_name"),
        AbsTaskClusteringLegacy: ("input_column_name", "label_column_name"),
        AbsTaskSummarization: tuple(
            f"{name}_column_name" for name in ("text", "human_summaries", "machine_summaries", "relevancy")
        ),
    }
    wanted = next((columns for kind, columns in kinds.items() if isinstance(task, kind)), ())
    names = [getattr(task, column, column) for column in wanted]
    splits = task.dataset if not task.metadata.is_multilingual else next(iter(task.dataset.values()))
    for split in task.metadata.eval_splits:
        columns = splits[split].column_names if split in splits else names
        missing = [name for name in names if isinstance(name, str) and name not in columns]
        if missing:
            raise UserError(f"{folder}: the rows of {split!r} lack {missing[0]!r}", nearest(missing[0], columns))


def _load_retrieval(task: AbsTask, folder: Path) -> dict[str, dict[str, Any]]:
    if find_table(folder, "corpus") is None:
        return _load_reranking(folder)
    corpus = [{**row, "title": row["title"] or ""} for row in _identified(_file(folder, "corpus"), ("title",))]
    queries = _identified(_file(folder, "queries"))
    splits: dict[str, dict[str, Any]] = {}
    for split, path in _qrels(folder).items():
        relevant = _read_qrels(path, {row["id"] for row in queries}, {row["id"] for row in corpus})
        splits[split] = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list([row for row in queries if row["id"] in relevant]),
            "relevant_docs": relevant,
            "top_ranked": _top_ranked(folder, split, set(relevant), {row["id"] for row in corpus}),
        }
    if not splits:
        raise UserError(f"{folder}: no qrels/<split>.tsv")
    return splits


def _qrels(folder: Path) -> dict[str, Path]:
    """Return the files with grades, by split: `qrels/<split>`, or `qrels` for the split `test`.

    Raises:
        UserError: there are both.
    """
    places, single = tables_in(folder / "qrels"), find_table(folder, "qrels")
    if single is not None and places:
        raise UserError(f"{single}: there is a folder qrels too", "keep one of the two")
    return places if single is None else {"test": single}


def _identified(path: Path, optional: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Read documents or queries: `id`, `text`, and the optional texts, which may be null or missing.

    Raises:
        UserError: two have the same id, or a text is none.
    """
    rows = read_table(path, ("_id", "text"))
    check_unique(rows, path)
    found = []
    for number, row in rows:
        more = {key: row.get(key) for key in optional}
        for key, value in {"text": row["text"], **{key: value for key, value in more.items() if value is not None}}.items():
            check_text(value, f"{place_of(path, number)}: {key!r}")
        found.append({"id": str(row["_id"]), **more, "text": row["text"]})
    return found


def _top_ranked(folder: Path, split: str, queries: set[str], documents: set[str]) -> dict[str, list[str]] | None:
    """Read the documents that each query ranks, from `top_ranked[/<split>].jsonl`; None: all (retrieval, not reranking)."""
    path = find_table(folder, f"top_ranked/{split}") or find_table(folder, "top_ranked")
    if path is None:
        return None
    ranked = {}
    for number, row in read_table(path, ("query-id", "corpus-ids")):
        if not isinstance(row["corpus-ids"], list) or not row["corpus-ids"]:
            raise UserError(f"{place_of(path, number)}: 'corpus-ids' must be a list of documents, got {row['corpus-ids']!r}")
        among = [str(document) for document in row["corpus-ids"]]
        unknown = [document for document in among if document not in documents]
        if unknown:
            raise UserError(f"{place_of(path, number)}: document {unknown[0]!r} is not in the corpus")
        if str(row["query-id"]) in queries:
            ranked[str(row["query-id"])] = among
    return ranked


def _load_reranking(folder: Path) -> dict[str, dict[str, Any]]:
    """Read `<split>.jsonl`, each row with a `query` (or a list of them) and its `positive` and `negative` passages."""
    splits: dict[str, dict[str, Any]] = {}
    files = tables_in(folder)
    if not files:
        raise UserError(f"{folder}: neither corpus.jsonl nor a <split>.jsonl with query, positive and negative")
    for split, path in files.items():
        corpus, queries = [], []
        relevant: dict[str, dict[str, int]] = {}
        ranked: dict[str, list[str]] = {}
        for number, (line, row) in enumerate(read_table(path, ("query", "positive", "negative"))):
            _check_passages(row, place_of(path, line))
            passages = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
            ids = [f"d{number}-{index}" for index in range(len(passages))]
            corpus += [{"id": own, "title": "", "text": text} for own, (text, _) in zip(ids, passages, strict=True)]
            asked = row["query"] if isinstance(row["query"], list) else [row["query"]]
            for index, text in enumerate(asked):
                query = f"q{number}-{index}"
                queries.append({"id": query, "text": text})
                relevant[query] = {own: grade for own, (_, grade) in zip(ids, passages, strict=True)}
                ranked[query] = ids
        check_relevant(relevant, path)
        splits[split] = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": ranked,
        }
    return splits


def _check_passages(row: dict[str, Any], place: str) -> None:
    """See that a row of reranking holds a query or several, and lists of passages.

    Raises:
        UserError: it does not.
    """
    for key in ("query", "positive", "negative"):
        value = row[key]
        if not isinstance(value, list) and key != "query":
            raise UserError(f"{place}: {key!r} must be a list of texts, got {value!r}")
        for text in value if isinstance(value, list) else [value]:
            check_text(text, f"{place}: {key!r}")


def _read_qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for number, query, document, grade in _grades_without_types(path) if suffix_of(path).startswith(".tsv") else _grades(path):
        if query not in queries or document not in documents:
            what = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise UserError(f"{place_of(path, number)}: {what} is not in its file")
        earlier = relevant.setdefault(query, {}).setdefault(document, grade)
        if earlier != grade:
            raise UserError(f"{place_of(path, number)}: query {query!r} and document {document!r} have the grade {earlier} too")
    check_relevant(relevant, path)
    return relevant


def _grades_without_types(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield line, query, document and grade of BEIR's layout, in which the heading may be missing."""
    for number, line in read_lines(path):
        if number == 1 and line.startswith("query-id"):
            continue
        try:
            fields = next(csv.reader([line], delimiter="\t"))
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if len(fields) != 3 or not _GRADE.fullmatch(fields[2].strip()):
            raise UserError(f"{path}, line {number}: expected 'query-id<TAB>corpus-id<TAB>score', got {line!r}")
        yield number, fields[0], fields[1], int(fields[2])


def _grades(path: Path) -> Iterator[tuple[int, str, str, int]]:
    """Yield the number of a row, query, document and grade."""
    for number, row in read_table(path, QRELS):
        grade = row["score"]
        if isinstance(grade, float) and grade.is_integer():
            grade = int(grade)
        if not _GRADE.fullmatch(str(grade).strip()):
            raise UserError(f"{place_of(path, number)}: 'score' must be a whole number, got {grade!r}")
        yield number, str(row["query-id"]), str(row["corpus-id"]), int(grade)
