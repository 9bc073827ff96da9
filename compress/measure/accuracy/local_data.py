"""Task data from a local folder: `<task>[/<subset>]/<split>.jsonl[.gz]` with the hub's columns; retrieval in BEIR's layout."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

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
from compress.data.texts import read_jsonl, read_lines

SUFFIXES = (".jsonl.gz", ".jsonl")


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
    loaded = {subset: load(task, folder / subset if (folder / subset).is_dir() else folder) for subset in present}
    task.hf_subsets = present
    if isinstance(task, AbsTaskRetrieval) or task.metadata.is_multilingual:
        task.dataset = loaded
    else:
        task.dataset = loaded[present[0]]
    task.dataset_transform()
    task.data_loaded = True
    if not isinstance(task, AbsTaskRetrieval):
        _check_columns(task, folder)
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
    files = {path.name.split(".jsonl")[0]: path for path in sorted(folder.glob("*.jsonl*")) if path.name.endswith(SUFFIXES)}
    if not files:
        raise UserError(f"{folder}: holds no <split>.jsonl or <split>.jsonl.gz")
    return DatasetDict({split: Dataset.from_list(read_jsonl(path, required)) for split, path in files.items()})


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
    corpus = [
        {"id": str(row["_id"]), "title": row.get("title") or "", "text": row["text"]}
        for row in read_jsonl(_file(folder, "corpus"), ("_id", "text"))
    ]
    queries = [{"id": str(row["_id"]), "text": row["text"]} for row in read_jsonl(_file(folder, "queries"), ("_id", "text"))]
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


def _top_ranked(folder: Path, split: str, queries: set[str], documents: set[str]) -> dict[str, list[str]] | None:
    """Read the documents that each query ranks, from `top_ranked[/<split>].jsonl`; None: all (retrieval, not reranking)."""
    places = [place for stem in (f"top_ranked/{split}", "top_ranked") for place in (folder / f"{stem}{s}" for s in SUFFIXES)]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    ranked = {}
    for number, row in enumerate(read_jsonl(path, ("query-id", "corpus-ids")), start=1):
        among = [str(document) for document in row["corpus-ids"]]
        unknown = [document for document in among if document not in documents]
        if unknown:
            raise UserError(f"{path}, row {number}: document {unknown[0]!r} is not in the corpus")
        if str(row["query-id"]) in queries:
            ranked[str(row["query-id"])] = among
    return ranked


def _load_reranking(folder: Path) -> dict[str, dict[str, Any]]:
    """Read `<split>.jsonl`, each row with a `query` (or a list of them) and its `positive` and `negative` passages."""
    splits: dict[str, dict[str, Any]] = {}
    files = [path for path in sorted(folder.glob("*.jsonl*")) if path.name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{folder}: neither corpus.jsonl nor a <split>.jsonl with query, positive and negative")
    for path in files:
        corpus, queries = [], []
        relevant: dict[str, dict[str, int]] = {}
        ranked: dict[str, list[str]] = {}
        for number, row in enumerate(read_jsonl(path, ("query", "positive", "negative"))):
            passages = [(text, 1) for text in row["positive"]] + [(text, 0) for text in row["negative"]]
            ids = [f"d{number}-{index}" for index in range(len(passages))]
            corpus += [{"id": own, "title": "", "text": text} for own, (text, _) in zip(ids, passages, strict=True)]
            asked = row["query"] if isinstance(row["query"], list) else [row["query"]]
            for index, text in enumerate(asked):
                query = f"q{number}-{index}"
                queries.append({"id": query, "text": text})
                relevant[query] = {own: grade for own, (_, grade) in zip(ids, passages, strict=True)}
                ranked[query] = ids
        splits[path.name.split(".jsonl")[0]] = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": relevant,
            "top_ranked": ranked,
        }
    return splits


def _read_qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        if number == 1 and line.startswith("query-id"):
            continue
        fields = next(csv.reader([line], delimiter="\t"))
        if len(fields) != 3 or not fields[2].strip().lstrip("-").isdigit():
            raise UserError(f"{path}, line {number}: expected 'query-id<TAB>corpus-id<TAB>score', got {line!r}")
        query, document, score = fields
        if query not in queries or document not in documents:
            what = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise UserError(f"{path}, line {number}: {what} is not in its file")
        relevant.setdefault(query, {})[document] = int(score)
    return relevant
