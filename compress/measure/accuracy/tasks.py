"""Tasks that measure accuracy: those of the mteb package, with data from the hub, a local folder or the embedded suite."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mteb
from datasets import disable_progress_bars
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskPairClassification, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

from compress.common.errors import UserError, nearest
from compress.data.texts import SUITE, fault_of_hub, keep_to_endpoint, same_text
from compress.measure.accuracy.local_data import fingerprint_of, load_local, published_splits
from compress.measure.accuracy.own_data import load_own
from compress.measure.accuracy.own_task import TYPES, OwnTask, is_own, read_own_task

MINI = "mini"
# For each of the seven types, the cheapest public tasks that still distinguish models: about 3 M tokens together.
LITE = (
    "STSBenchmark",
    "BIOSSES",
    "Banking77Classification",
    "SciFact",
    "AskUbuntuDupQuestions",
    "TwitterSemEval2015",
    "TwentyNewsgroupsClustering.v2",
    "SummEvalSummarization.v2",
)
# Short names for mteb's benchmarks; the others are found by mteb's own names.
BENCHMARKS = {"mteb-eng-v1": "MTEB(eng, v1)", "mteb-eng-v2": "MTEB(eng, v2)"}


@dataclass(frozen=True)
class Task:
    """A task of mteb, and the folder of its data (None: on the hub)."""

    mteb: Any
    folder: Path | None
    files: tuple[Path, ...] | None = None
    """Files of the folder that decide a score; None: all."""

    @property
    def name(self) -> str:
        """Name in mteb."""
        return str(self.mteb.metadata.name)

    @property
    def fingerprint(self) -> str:
        """Identifier of the data: a hash of the local files, or the hub's revision."""
        if self.folder is None:
            return str(self.mteb.metadata.revision)
        files = self.files if self.files is not None else [path for path in self.folder.rglob("*") if path.is_file()]
        return fingerprint_of(self.folder, files)


def evaluated_texts(tasks: Iterable[Task]) -> frozenset[str]:
    """Return every text of the tasks' data, training splits included, normalized by `same_text`; downloads what is on the hub."""
    found: set[str] = set()
    for task in tasks:
        load_data(task)
        found.update(same_text(text) for text in _strings(task.mteb.dataset))
    return frozenset(found)


def load_data(task: Task) -> None:
    """Load a task's data where it lies on the hub and is not loaded yet.

    Raises:
        UserError: it cannot be loaded: no such data set or revision, no access, no network, not in the cache.
    """
    if task.folder is not None or task.mteb.data_loaded:
        return
    try:
        task.mteb.load_data()
    except Exception as error:  # of many kinds, from many libraries: whatever it is, the user is told and the run ends
        path = task.mteb.metadata.dataset["path"]
        reason, token = fault_of_hub(error)
        local = "give a folder that holds it (--data), or use the embedded suite (--tasks mini)"
        raise UserError(
            f"task {task.name!r}: its data, {path} on the hub, cannot be loaded ({reason})", "; ".join(filter(None, (local, token)))
        ) from error


def _strings(data: Any) -> Iterator[str]:
    """Yield every string in nested containers and tables."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _strings(value)
    elif isinstance(data, Iterable):
        for value in data:
            yield from _strings(value)


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
    """Sentence pairs over the whole range of similarity; word overlap is misleading."""

    metadata = _metadata("MiniSTS", "STS", "cosine_spearman", "Sentence pairs of the embedded suite.")


class MiniRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
    """Short documents in families of near misses: numbers, names, negation."""

    metadata = _metadata("MiniRetrieval", "Retrieval", "ndcg_at_10", "Near-miss retrieval of the embedded suite.")


class MiniIntentClassification(AbsTaskClassification):  # type: ignore[misc]
    """Intents of a shop's help desk, some of them close to each other."""

    metadata = _metadata("MiniIntentClassification", "Classification", "accuracy", "Help-desk intents of the embedded suite.")


class MiniClustering(AbsTaskClustering):  # type: ignore[misc]
    """Messages about ten close subjects that share words with different senses."""

    metadata = _metadata("MiniClustering", "Clustering", "v_measure", "Messages by subject, of the embedded suite.")
    max_fraction_of_documents_to_embed = None  # all documents: mteb's default of 4 % would be twelve


class MiniPairClassification(AbsTaskPairClassification):  # type: ignore[misc]
    """Do two sentences say the same? Paraphrases without common words against near misses."""

    metadata = _metadata("MiniPairClassification", "PairClassification", "max_ap", "Paraphrases of the embedded suite.")


class MiniReranking(AbsTaskRetrieval):  # type: ignore[misc]
    """Which of about ten passages answers the question? The others were written to look similar."""

    metadata = _metadata("MiniReranking", "Reranking", "map_at_1000", "Answers among near misses, of the embedded suite.")


EMBEDDED = {
    task.metadata.name: task
    for task in (MiniSTS, MiniRetrieval, MiniIntentClassification, MiniClustering, MiniPairClassification, MiniReranking)
}


def find_tasks(names: Iterable[str], data: Path | None) -> list[Task]:
    """Find tasks by name. Local data is loaded at once, so that faults in it are found before any work is done.

    Args:
        names: names of mteb's tasks or benchmarks, `mini` for the embedded suite, `lite`, `mteb-eng-v1` or `mteb-eng-v2`; paths of
            folders with tasks of one's own (`./my-task`).
        data: folder laid out as `<task>[/<subset>]/<split>.jsonl[.gz]` (retrieval in BEIR's layout); None: the hub.

    Raises:
        UserError: a task is unknown, is not in the folder, or has a fault in its files (named with file and line).
    """
    # Superseded tasks are wanted on purpose: published scores are of them. Progress bars over tiny data sets are noise.
    warnings.filterwarnings("ignore", message=".*superseded.*")
    disable_progress_bars()
    keep_to_endpoint()
    logging.getLogger("mteb").setLevel(logging.ERROR)
    if data is not None and not data.is_dir():
        raise UserError(f"data folder {data}: not a folder")
    wanted: dict[str, Any] = {}
    for name in names:
        if is_own(name):
            own = read_own_task(Path(name))
            _check_name(own, wanted)
            wanted[own.name] = own
        else:
            wanted |= _expand(name)
    if not wanted:
        raise UserError(
            "no tasks are named",
            "evaluate.tasks or --tasks: mini, lite, names of mteb's tasks or benchmarks, or a folder (./my-task)",
        )
    return [
        Task(load_own(found), found.folder, found.files) if isinstance(found, OwnTask) else _with_data(name, found, data)
        for name, found in wanted.items()
    ]


def _check_name(own: OwnTask, others: Mapping[str, Any]) -> None:
    """See that an own task has a name of its own: records, prompts and comparisons know tasks by their names.

    Raises:
        UserError: it has that of a public task, of a type or role, or of another own task of the call.
    """
    other = others.get(own.name)
    if isinstance(other, OwnTask) and other.folder.resolve() == own.folder.resolve():
        return
    taken = {"query", "document", "text", *(kind.mteb for kind in TYPES.values())}
    if other is not None or own.name in taken or own.name in _known():
        of = f"that of {other.folder}" if isinstance(other, OwnTask) else "taken: a public task, a type or a role is called so"
        raise UserError(f"task {own.folder}: its name {own.name!r} is {of}", "give it one by the key 'name' of its task.yaml")


@cache
def _known() -> frozenset[str]:
    """Return every name that stands for public tasks."""
    tasks = {task.metadata.name for task in mteb.get_tasks(exclude_superseded=False)}
    return frozenset({MINI, "lite", *BENCHMARKS, *EMBEDDED, *(benchmark.name for benchmark in mteb.get_benchmarks()), *tasks})


def _expand(name: str) -> dict[str, Any]:
    """Return the mteb tasks that a name stands for, by their own names."""
    if name == MINI:
        return {own: kind() for own, kind in EMBEDDED.items()}
    if name in EMBEDDED:
        return {name: EMBEDDED[name]()}
    if name == "lite":
        return {own: _task(own) for own in LITE}
    benchmarks = {benchmark.name: benchmark for benchmark in mteb.get_benchmarks()}
    if BENCHMARKS.get(name, name) in benchmarks:
        tasks = benchmarks[BENCHMARKS.get(name, name)].tasks
        return {task.metadata.name: copy.deepcopy(task) for task in tasks}  # with the benchmark's languages and splits
    try:
        return {name: _task(name)}
    except KeyError as error:
        hint = f"a folder with a task is named ./{name}" if Path(name).is_dir() else nearest(name, _known())
        raise UserError(f"unknown task {name!r}", hint) from error


def _task(name: str) -> Any:
    task = mteb.get_task(name)
    task.filter_eval_splits(published_splits(list(task.eval_splits)))
    return task


def _with_data(name: str, found: Any, data: Path | None) -> Task:
    """Load a task's data if it is local."""
    if name in EMBEDDED:
        folder: Path | None = SUITE / name
    elif data is None:
        return Task(found, None)
    else:
        folder = next((data / known for known in _names(name) if (data / known).is_dir()), None)
        if folder is None:
            there = sorted(path.name for path in data.iterdir() if path.is_dir())
            raise UserError(f"task {name!r}: the data folder {data} has no folder of that name", nearest(name, there))
    assert folder is not None
    load_local(found, folder)
    return Task(found, folder)


def _names(name: str) -> list[str]:
    """Return a task's name and the names of the tasks that it supersedes, which have the same data."""
    return [name, *_superseded().get(name, ())]


@cache
def _superseded() -> dict[str, list[str]]:
    """Return the names of the tasks that each task supersedes: mteb makes all of its tasks to tell, which takes a second."""
    found: dict[str, list[str]] = {}
    for task in sorted(mteb.get_tasks(exclude_superseded=False), key=lambda task: str(task.metadata.name)):
        found.setdefault(task.superseded_by, []).append(task.metadata.name)
    return found
