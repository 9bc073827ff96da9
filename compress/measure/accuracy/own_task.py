"""A task of the user's own: a folder with `task.yaml` and files of texts. Says what the types are; needs no mteb.

`own_data` loads one for mteb's scorers; docs/own-tasks.md is the page for users.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.common.errors import UserError, nearest
from compress.common.files import check_target, naming, write_text_atomic
from compress.common.yaml_files import Fault, fault_at, faults_of, plain, read_yaml, refuse
from compress.data.tables import SUFFIXES, find_table, stem_of, suffix_of

TASK_FILE = "task.yaml"
EXAMPLES = Path(str(resources.files("compress.data"))) / "own_tasks"
SPLITS = ("train", "validation", "dev", "test")
"""Files of a type without a corpus. `test` is scored, `train` teaches a classifier; others are read and not scored."""
CUTS = (1, 3, 5, 10, 20, 100, 1000)
"""Ranks at which mteb scores retrieval."""
RANKING = tuple(f"{name}_at_{cut}" for name in ("ndcg", "map", "mrr", "recall", "precision", "hit_rate") for cut in CUTS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{3}(-[A-Z][a-z]{3})?")


@dataclass(frozen=True)
class OwnType:
    """A type of task."""

    mteb: str
    """mteb's name of the type."""
    files: tuple[str, ...]
    """Files that it needs, without their suffixes."""
    others: tuple[str, ...]
    """Files that it may have."""
    columns: Mapping[str, tuple[str, ...]]
    """The columns of each file; `split` stands for files of splits."""
    metrics: tuple[str, ...]
    """What it may be scored by, the default first. mteb has more, but no values of single examples for an interval."""


SEARCHED = {"corpus": ("_id", "text"), "queries": ("_id", "text"), "qrels": ("query-id", "corpus-id", "score")}
TYPES: Mapping[str, OwnType] = {
    "retrieval": OwnType("Retrieval", ("corpus", "queries", "qrels"), (), SEARCHED, ("ndcg_at_10", *RANKING)),
    "reranking": OwnType(
        "Reranking",
        ("test",),
        SPLITS,
        {"split": ("query", "positive", "negative"), **SEARCHED, "top_ranked": ("query-id", "corpus-ids")},
        ("map_at_1000", *RANKING),
    ),
    "sts": OwnType("STS", ("test",), SPLITS, {"split": ("sentence1", "sentence2", "score")}, ("cosine_spearman",)),
    "pairs": OwnType(
        "PairClassification", ("test",), SPLITS, {"split": ("sentence1", "sentence2", "labels")}, ("max_ap", "cosine_ap")
    ),
    "classification": OwnType("Classification", ("train", "test"), SPLITS, {"split": ("text", "label")}, ("accuracy",)),
    "clustering": OwnType("Clustering", ("test",), SPLITS, {"split": ("sentences", "labels")}, ("v_measure",)),
}
"""The types of own tasks."""
RANKED_FILES = ("corpus", "queries", "qrels", "top_ranked")
"""Files of a reranking task in which several queries share documents, in place of `test`."""


class TaskFile(BaseModel):
    """What `task.yaml` says."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    type: str
    """One of `TYPES`."""
    language: str
    """ISO 639-3 code of the texts' language, with or without a script (ISO 15924): `eng`, `zho-Hans`."""
    metric: str | None = None
    """What the task is scored by; defaults to the first metric of its type."""
    name: str | None = None
    """Name in records and of prompts; defaults to the folder's name."""


@dataclass(frozen=True)
class OwnTask:
    """A folder with a task, as its `task.yaml` and the names of its files say."""

    folder: Path
    type: str
    language: str
    metric: str
    name: str
    files: tuple[Path, ...]
    """Every file that decides a score, `task.yaml` first."""

    @property
    def kind(self) -> OwnType:
        """Its type."""
        return TYPES[self.type]


def is_own(name: str) -> bool:
    """Whether a name of a task is the path of a folder: it has a slash, which no name of mteb's has."""
    return "/" in name or name in (".", "..")


def resolved(names: Iterable[str], folder: Path) -> tuple[str, ...]:
    """Return names of tasks with the paths among them made absolute; relative ones are below `folder`."""
    return tuple(str((folder / Path(name).expanduser()).resolve()) if is_own(name) else name for name in names)


def read_own_task(folder: Path) -> OwnTask:
    """Read `task.yaml` of a folder and see that the files of its type are there, and no others.

    Raises:
        UserError: it is no such folder, `task.yaml` is faulty, or a file is missing, there twice or unknown.
    """
    if not folder.is_dir():
        near = [str(path) for path in folder.parent.glob("*/") if (path / TASK_FILE).is_file()] if folder.parent.is_dir() else []
        raise UserError(f"task {folder}: not a folder", nearest(str(folder), near) if near else f"compress task init {folder}")
    path = folder / TASK_FILE
    if not path.exists():
        other = next((found.name for found in sorted(folder.glob("*.y*ml"))), None)
        hint = f"rename {other} to {TASK_FILE}" if other else "two lines, type: retrieval and language: eng; see compress task init"
        raise UserError(f"{folder}: has no {TASK_FILE}, which says the type of the task", hint)
    data = read_yaml(path, f"{TASK_FILE} of a task", "type: retrieval, and language: eng in the next line")
    try:
        said = TaskFile.model_validate(plain(data))
    except ValidationError as error:
        refuse(faults_of(error, TaskFile, data, ()), str(path))
        raise
    name = folder.resolve().name if said.name is None else said.name
    refuse(_faults(said, name, data), str(path))
    metric = TYPES[said.type].metrics[0] if said.metric is None else said.metric
    files = _files(folder, said.type)
    return OwnTask(folder, said.type, said.language, metric, name, (path, *files))


def _faults(said: TaskFile, name: str, data: Any) -> list[Fault]:
    """Return what is wrong with the values of `task.yaml`."""
    faults = []
    if said.type not in TYPES:
        faults.append(fault_at(data, ("type",), f"unknown type {said.type!r}; {nearest(said.type, TYPES)}"))
    elif said.metric is not None and said.metric not in TYPES[said.type].metrics:
        known = nearest(said.metric, sorted(set(TYPES[said.type].metrics)))
        faults.append(fault_at(data, ("metric",), f"{said.type} is not scored by {said.metric!r}; {known}"))
    if not _LANGUAGE.fullmatch(said.language):
        what = "is not of the form eng or eng-Latn: three letters of ISO 639-3, and a script if one is to be named"
        faults.append(fault_at(data, ("language",), f"{said.language!r} {what}"))
    if not _NAME.fullmatch(name):
        given = "" if said.name is not None else "; give the task one by the key 'name'"
        faults.append(
            fault_at(data, ("name",), f"{name!r} is no name: up to 64 letters, digits, dots, dashes and underscores{given}")
        )
    return faults


def _files(folder: Path, type: str) -> list[Path]:
    """Return the files of a task's data.

    Raises:
        UserError: one is missing, there twice, or not of this type.
    """
    kind = TYPES[type]
    ranked = type == "reranking" and any(find_table(folder, stem) for stem in ("corpus", "top_ranked"))
    wanted, others = (RANKED_FILES, ()) if ranked else (kind.files, kind.others)
    known = {*wanted, *others}
    found = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if any(part.startswith(".") for part in place.parts):
            continue
        if path.is_dir() or not suffix_of(path):
            _check_other(path, known)
            continue
        stem = stem_of(place)
        below = place.parent.name
        if not (stem in known and not below) and not (below in ("qrels", "top_ranked") and below in known and stem in SPLITS):
            raise UserError(f"{path}: {type} has no file of this name", nearest(stem, known))
        found.append(path)
    for stem in wanted:
        if find_table(folder, stem) is None and find_table(folder, f"{stem}/test") is None:
            columns = kind.columns.get(stem) or kind.columns["split"]
            hint = f"{stem}.jsonl (or {', '.join(SUFFIXES[2:])}) with the columns {', '.join(columns)}"
            raise UserError(f"{folder}: {type} needs a file {stem}, and there is none", hint)
    return found


def _check_other(path: Path, known: Iterable[str]) -> None:
    """See that a folder, or a file of another format, is not meant to be data.

    Raises:
        UserError: it is named as data is.
    """
    if path.is_dir():
        if path.name not in ("qrels", "top_ranked") or path.name not in known:
            raise UserError(f"{path}: a folder, which this type of task does not have", "move it away; data is in files next to it")
    elif path.name != TASK_FILE and path.name.split(".")[0] in known:
        raise UserError(f"{path}: this format is not read", f"save it as one of {', '.join(SUFFIXES)}")


def write_example(folder: Path, type: str) -> list[Path]:
    """Write a small task of a type, which is right as it stands, to be filled with one's own texts.

    Returns:
        The files.

    Raises:
        UserError: the type is unknown, or the folder is not empty or cannot be written.
    """
    if type not in TYPES:
        raise UserError(f"--type {type!r} is not known", nearest(type, TYPES))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: already exists and is not empty", "choose another folder")
    check_target(folder / TASK_FILE)
    written = []
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted((EXAMPLES / type).iterdir()):
            write_text_atomic(folder / path.name, path.read_text(encoding="utf-8"))
            written.append(folder / path.name)
    return written
