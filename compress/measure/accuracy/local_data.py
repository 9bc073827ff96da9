"""Task data from a local folder: `<task>[/<subset>]/<split>.jsonl[.gz]` with the hub's columns; retrieval in BEIR's layout."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
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
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)

from compress.common.errors import UserError, nearest
from compress.data.texts import check_text, read_lines, read_rows
from compress.measure.accuracy.data_checks import Rows, check_relevant, check_rows, check_unique

SUFFIXES = (".jsonl.gz", ".jsonl")
# A grade fits into the 64 bits of mteb's scorer.
_GRADE = re.compile(r"-?[0-9]{1,9}")


def load_local(task: AbsTask, folder: Path) -> None:
    """Load the data of a local folder into a task. The task keeps only the subsets and splits that the folder has.

    Raises:
        UserError: the folder has none of the task's subsets or splits, or a file is faulty.
    """
    present = [subset for subset in task.hf_subsets if (folder / subset).is_dir()]
    if not present and len(task.hf_subsets) == 1:
        present = list(task.hf_subsets)
    if not present:
        raise UserError(f"{folder}: has none of the subsets of {task.metadata.name}: {', '.join(task.hf_subsets[:8])}")
    load = _load_retrieval if isinstance(task, AbsTaskRetrieval) else _load_splits
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
    for suffix in SUFFIXES:
        if (folder / f"{stem}{suffix}").is_file():
            return folder / f"{stem}{suffix}"
    raise UserError(f"{folder}: no {stem}.jsonl or {stem}.jsonl.gz")


def _load_splits(task: AbsTask, folder: Path) -> DatasetDict:
    required: tuple[str, ...] = ()
    if isinstance(task, AbsTaskSTS):
        required = (*task.column_names, "score")
    elif isinstance(task, AbsTaskClassification):
        required = (task.input_column_name, task.label_column_name)
    files = _files(folder)
    if not files:
        raise UserError(f"{folder}: holds no <split>.jsonl or <split>.jsonl.gz")
    return DatasetDict({split: _table(path, read_rows(path, required)) for split, path in files.items()})


def _files(folder: Path) -> dict[str, Path]:
    """Return the files of a folder's splits, by split."""
    return {path.name.split(".jsonl")[0]: path for path in sorted(folder.glob("*.jsonl*")) if path.name.endswith(SUFFIXES)}


def _places(splits: Any, folder: Path) -> dict[str, Rows]:
    """Return the rows of each split with the file that they were read from."""
    return {split: Rows(splits[split], path) for split, path in _files(folder).items() if split in splits}


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
                        check_text(text, f"{path}, line {number}: {key!r}")
                kind = float if type(value) is int else type(value)
                known, first = kinds.setdefault(key, (kind, number)) if value is not None else (kind, number)
                if kind is not known:
                    names = f"{kind.__name__}, and in line {first} {known.__name__}"
                    raise UserError(f"{path}, line {number}: {key!r} is of type {names}") from error
        raise UserError(f"{path}: its rows make no table ({str(error).splitlines()[0][:120]})") from error


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
    if not any((folder / f"corpus{suffix}").is_file() for suffix in SUFFIXES):
        return _load_reranking(folder)
    corpus = [{**row, "title": row["title"] or ""} for row in _identified(_file(folder, "corpus"), ("title",))]
    queries = _identified(_file(folder, "queries"))
    splits: dict[str, dict[str, Any]] = {}
    for path in sorted((folder / "qrels").glob("*.tsv")):
        relevant = _read_qrels(path, {row["id"] for row in queries}, {row["id"] for row in corpus})
        splits[path.stem] = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list([row for row in queries if row["id"] in relevant]),
            "relevant_docs": relevant,
            "top_ranked": _top_ranked(folder, path.stem, set(relevant), {row["id"] for row in corpus}),
        }
    if not splits:
        raise UserError(f"{folder}: no qrels/<split>.tsv")
    return splits


def _identified(path: Path, optional: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Read documents or queries: `id`, `text`, and the optional texts, which may be null or missing.

    Raises:
        UserError: two have the same id, or a text is none.
    """
    rows = read_rows(path, ("_id", "text"))
    check_unique(rows, path)
    found = []
    for number, row in rows:
        more = {key: row.get(key) for key in optional}
        for key, value in {"text": row["text"], **{key: value for key, value in more.items() if value is not None}}.items():
            check_text(value, f"{path}, line {number}: {key!r}")
        found.append({"id": str(row["_id"]), **more, "text": row["text"]})
    return found


def _top_ranked(folder: Path, split: str, queries: set[str], documents: set[str]) -> dict[str, list[str]] | None:
    """Read the documents that each query ranks, from `top_ranked[/<split>].jsonl`; None: all (retrieval, not reranking)."""
    places = [place for stem in (f"top_ranked/{split}", "top_ranked") for place in (folder / f"{stem}{s}" for s in SUFFIXES)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    ranked = {}
    for number, row in read_rows(path, ("query-id", "corpus-ids")):
        if not isinstance(row["corpus-ids"], list) or not row["corpus-ids"]:
            raise UserError(f"{path}, line {number}: 'corpus-ids' must be a list of documents, got {row['corpus-ids']!r}")
        among = [str(document) for document in row["corpus-ids"]]
        unknown = [document for document in among if document not in documents]
        if unknown:
            raise UserError(f"{path}, line {number}: document {unknown[0]!r} is not in the corpus")
        if str(row["query-id"]) in queries:
            ranked[str(row["query-id"])] = among
    return ranked


def _load_reranking(folder: Path) -> dict[str, dict[str, Any]]:
    """Read `<split>.jsonl`, each row with a `query` (or a list of them) and its `positive` and `negative` passages."""
    splits: dict[str, dict[str, Any]] = {}
    files = list(_files(folder).values())
    if not files:
        raise UserError(f"{folder}: neither corpus.jsonl nor a <split>.jsonl with query, positive and negative")
    for path in files:
        corpus, queries = [], []
        relevant: dict[str, dict[str, int]] = {}
        ranked: dict[str, list[str]] = {}
        for number, (line, row) in enumerate(read_rows(path, ("query", "positive", "negative"))):
            _check_passages(row, f"{path}, line {line}")
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
        splits[path.name.split(".jsonl")[0]] = {
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
    for number, line in read_lines(path):
        if number == 1 and line.startswith("query-id"):
            continue
        try:
            fields = next(csv.reader([line], delimiter="\t"))
        except csv.Error as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        if len(fields) != 3 or not _GRADE.fullmatch(fields[2].strip()):
            raise UserError(f"{path}, line {number}: expected 'query-id<TAB>corpus-id<TAB>score', got {line!r}")
        query, document, score = fields
        if query not in queries or document not in documents:
            what = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise UserError(f"{path}, line {number}: {what} is not in its file")
        relevant.setdefault(query, {})[document] = int(score)
    check_relevant(relevant, path)
    return relevant
