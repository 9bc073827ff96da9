"""Loads a task of the user's own into mteb's class of its type, so that it is scored as any other task is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.languages import ISO_TO_LANGUAGE, ISO_TO_SCRIPT

from compress.common.errors import UserError, nearest
from compress.common.yaml_files import fault_at, read_yaml, refuse
from compress.measure.accuracy.local_data import fingerprint_of, load_local
from compress.measure.accuracy.own_task import TASK_FILE, OwnTask

CLASSES: Mapping[str, type[AbsTask]] = {
    "retrieval": AbsTaskRetrieval,
    "reranking": AbsTaskRetrieval,
    "sts": AbsTaskSTS,
    "pairs": AbsTaskPairClassification,
    "classification": AbsTaskClassification,
    "clustering": AbsTaskClustering,
}
"""mteb's class of each type."""


def load_own(own: OwnTask) -> AbsTask:
    """Return an own task as one of mteb's, with its data.

    Raises:
        UserError: its language is none, or its data is faulty; names file and line.
    """
    _check_language(own)
    metadata = TaskMetadata(
        name=own.name,
        dataset={"path": f"own/{own.name}", "revision": fingerprint_of(own.folder, own.files)},
        description=f"The task {own.name} of a user's own.",
        type=own.kind.mteb,
        category="t2c" if own.type == "classification" else "t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=[own.language],
        main_score=own.metric,
    )
    settings: dict[str, Any] = {"metadata": metadata}
    if own.type == "clustering":
        settings["max_fraction_of_documents_to_embed"] = None  # all texts: mteb's default of 4 % of a small task is next to none
    task = type(own.name, (CLASSES[own.type],), settings)()
    load_local(task, own.folder, own.kind.columns.get("split", ()))
    if own.type == "reranking":
        _check_ranked(task, own)
    return task


def _check_language(own: OwnTask) -> None:
    """See that the language is one.

    Raises:
        UserError: it is not.
    """
    language, _, script = own.language.partition("-")
    for code, known, norm in (
        (language, ISO_TO_LANGUAGE, "a language of ISO 639-3"),
        (script, ISO_TO_SCRIPT, "a script of ISO 15924"),
    ):
        if code and code not in known:
            path = own.folder / TASK_FILE
            said = read_yaml(path, TASK_FILE, "")
            refuse([fault_at(said, ("language",), f"{code!r} is not {norm}; {nearest(code, known)}")], str(path))


def _check_ranked(task: Any, own: OwnTask) -> None:
    """See that every query has documents to rank.

    Raises:
        UserError: one has none.
    """
    data = task.dataset["default"]["test"]
    lacking = next((query for query in data["relevant_docs"] if query not in data["top_ranked"]), None)
    if lacking is not None:
        raise UserError(f"{own.folder}: query {lacking!r} has grades, and top_ranked has no documents for it")
