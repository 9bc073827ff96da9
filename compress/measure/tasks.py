"""Tasks to measure accuracy on: the mteb package's own, with data from the hub, from a local folder or from the embedded suite."""

from __future__ import annotations

import csv
import hashlib
import logging
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, DatasetDict, disable_progress_bars
from mteb.abstasks import AbsTask, AbsTaskClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from compress.errors import UserError, nearest
from compress.texts import SUITE, read_jsonl, read_lines

MINI = "mini"
SUFFIXES = (".jsonl.gz", ".jsonl")


@dataclass(frozen=True)
class Task:
    """A task of mteb, and where its data lies (None: on the hub)."""

    mteb: Any
    folder: Path | None

    @property
    def name(self) -> str:
        """Name in mteb."""
        return str(self.mteb.metadata.name)

    @property
    def fingerprint(self) -> str:
        """Identify the data: a hash of the local files, or the hub's revision."""
        if self.folder is None:
            return str(self.mteb.metadata.revision)
        digest = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            digest.update(str(path.relative_to(self.folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]


def _metadata(name: str, kind: str, main_score: str, description: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        dataset={"path": f"embedded/{name}", "revision": "1"},
        description=description,
        type=kind,
        category="t2t" if kind != "Classification" else "t2c",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        license="apache-2.0",
        annotations_creators="LM-generated and reviewed",
        sample_creation="created",
    )


class MiniSTS(AbsTaskSTS):  # type: ignore[misc]
    """Sentence pairs over the whole range of similarity; word overlap misleads."""

    metadata = _metadata("MiniSTS", "STS", "cosine_spearman", "Sentence pairs of the embedded suite.")


class MiniRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    """Short documents in families of near misses: numbers, names, negation."""

    metadata = _metadata("MiniRetrieval", "Retrieval", "ndcg_at_10", "Near-miss retrieval of the embedded suite.")


class MiniIntentClassification(AbsTaskClassification):  # type: ignore[misc]
    """Intents of a shop's help desk, several of them close to each other."""

    metadata = _metadata("MiniIntentClassification", "Classification", "accuracy", "Help-desk intents of the embedded suite.")


EMBEDDED = {task.metadata.name: task for task in (MiniSTS, MiniRetrieval, MiniIntentClassification)}


def find_tasks(names: Iterable[str], data: Path | None) -> list[Task]:
    """Find tasks by name, with their data loaded where it is local, so that a fault in it is seen before any work is done.

    Args:
        names: names of mteb tasks, or `mini` for the embedded suite.
        data: a folder `<task>[/<subset>]/<split>.jsonl[.gz]` (retrieval in BEIR's layout); None: the hub.

    Raises:
        UserError: an unknown task, a task that the folder lacks, or a fault in its files (with file and line).
    """
    # Superseded tasks are asked for on purpose (published figures are of them), and bars over tiny data sets tell nobody anything.
    warnings.filterwarnings("ignore", message=".*superseded.*")
    disable_progress_bars()
    logging.getLogger("mteb").setLevel(logging.ERROR)
    if data is not None and not data.is_dir():
        raise UserError(f"data folder {data}: not a folder")
    wanted: dict[str, None] = {}
    for name in names:
        wanted |= dict.fromkeys(EMBEDDED if name == MINI else [name])
    if not wanted:
        raise UserError("no tasks are named", "evaluate.tasks or --tasks: mini, or names of mteb's tasks")
    return [_find_task(name, data) for name in wanted]


def _find_task(name: str, data: Path | None) -> Task:
    if name in EMBEDDED:
        task = Task(EMBEDDED[name](), SUITE / name)
    else:
        try:
            found = mteb.get_task(name)
        except KeyError as error:
            known = {MINI, *EMBEDDED, *(task.metadata.name for task in mteb.get_tasks(exclude_superseded=False))}
            raise UserError(f"unknown task {name!r}", nearest(name, known)) from error
        if data is None:
            return Task(found, None)
        if not (data / name).is_dir():
            there = sorted(path.name for path in data.iterdir() if path.is_dir())
            raise UserError(f"task {name!r}: the data folder {data} has no folder of that name", nearest(name, there))
        task = Task(found, data / name)
    assert task.folder is not None
    load_local(task.mteb, task.folder)
    return task


def load_local(task: AbsTask, folder: Path) -> None:
    """Put the data of a local folder into a task, and leave in it only the subsets and splits that the folder has.

    Raises:
        UserError: the folder has none of the task's subsets or splits, or a file is broken.
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
    splits = [split for split in task.metadata.eval_splits if all(split in splits for splits in loaded.values())]
    if not splits:
        raise UserError(
            f"{folder}: has none of the splits {task.metadata.name} is scored on: {', '.join(task.metadata.eval_splits)}"
        )
    task.filter_eval_splits(splits)


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


def _load_retrieval(task: AbsTask, folder: Path) -> dict[str, dict[str, Any]]:
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
            "top_ranked": None,
        }
    if not splits:
        raise UserError(f"{folder}: no qrels/<split>.tsv")
    return splits


def _read_qrels(path: Path, queries: set[str], documents: set[str]) -> dict[str, dict[str, int]]:
    relevant: dict[str, dict[str, int]] = {}
    for number, line in read_lines(path):
        if number == 1 and line.startswith("query-id"):
            continue
        fields = next(csv.reader([line], delimiter="\t"))
        if len(fields) != 3 or not fields[2].strip().lstrip("-").isdigit():
            raise UserError(f"{path}, line {number}: 'query-id<TAB>corpus-id<TAB>score' is wanted, this is {line!r}")
        query, document, score = fields
        if query not in queries or document not in documents:
            what = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise UserError(f"{path}, line {number}: {what} is in no row of its file")
        relevant.setdefault(query, {})[document] = int(score)
    return relevant
