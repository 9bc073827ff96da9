"""One check of a task's local data before anything is computed: whether it can be scored at all, by file and line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRegression,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from mteb.abstasks.multilabel_classification import AbsTaskMultilabelClassification

from compress.common.errors import UserError
from compress.data.tables import place_of, read_table, unit_of
from compress.data.texts import check_text


@dataclass(frozen=True)
class Rows:
    """The rows of one split, as a task is scored on them, and where they were read."""

    data: Any
    """The rows, after the task's own transformation."""
    path: Path

    def place(self, index: int, column: str) -> str:
        """Return where a value was read, for an error: the file is read again for the number of its line."""
        numbers = [number for number, _ in read_table(self.path)]
        # Of another number where the transformation has changed the rows.
        changed = len(numbers) != len(self.data)
        where = f"{self.path}, row {index + 1} of the task" if changed else place_of(self.path, numbers[index])
        return f"{where}: {column!r}"

    def text(self, value: Any, index: int, column: str) -> None:
        """See that a value is a text; see `check_text`."""
        try:
            check_text(value, "")
        except UserError as error:
            raise UserError(f"{self.place(index, column)}{error.message}", error.hint) from error

    def number(self, value: Any, index: int, column: str) -> float:
        """Return a value that must be a finite number."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"{self.place(index, column)} must be a finite number, got {value!r}")
        return float(value)

    def label(self, value: Any, index: int, column: str) -> int | str:
        """Return a label, which is an integer or a string."""
        if isinstance(value, float) and value.is_integer():  # of a column in which other rows lack the label
            value = int(value)
        if not isinstance(value, (int, str)):
            given = "null" if value is None else repr(value)
            raise UserError(f"{self.place(index, column)} must be an integer or a string, got {given}")
        return value

    def column(self, name: str) -> list[Any]:
        """Return a column's values."""
        return list(self.data[name])


def check_rows(task: AbsTask, splits: Mapping[str, Rows]) -> None:
    """See that the splits of one subset can be scored; see the functions for each kind of task.

    Raises:
        UserError: they cannot; names file and line.
    """
    check = next((check for kind, check in CHECKS if isinstance(task, kind)), None)
    if check is not None:
        check(task, splits)


def scored_splits(task: AbsTask, splits: Mapping[str, Rows]) -> list[Rows]:
    """Return the splits that the task is scored on."""
    return [splits[name] for name in task.metadata.eval_splits if name in splits]


def _check_texts(rows: Rows, columns: Iterable[str]) -> None:
    """See that columns hold texts, or lists of them."""
    for name in columns:
        for index, value in enumerate(rows.column(name)):
            for text in value if isinstance(value, list) else [value]:
                if not isinstance(text, str) or not text.isascii():
                    rows.text(text, index, name)


def _labels(rows: Rows, column: str) -> list[int | str]:
    """Return a column of labels, the first of each where a row has several levels.

    Raises:
        UserError: one is none, or some are strings and others numbers.
    """
    values = [value[0] if isinstance(value, list) and value else value for value in rows.column(column)]
    found = [rows.label(value, index, column) for index, value in enumerate(values)]
    other = next((index for index, label in enumerate(found) if isinstance(label, str) != isinstance(found[0], str)), None)
    if other is not None:
        raise UserError(f"{rows.place(other, column)} is {found[other]!r}, and that of the first row {found[0]!r}: one is a string")
    return found


def _check_different(values: Sequence[Any], path: Path, column: str, why: str) -> None:
    """See that a column has two values.

    Raises:
        UserError: all are equal.
    """
    if len(set(values)) < 2:
        raise UserError(f"{path}: {column!r} is {values[0]!r} in all of {len(values)} rows; {why}")


def _check_sts(task: Any, splits: Mapping[str, Rows]) -> None:
    """Pairs of texts with numbers that differ."""
    for rows in scored_splits(task, splits):
        _check_texts(rows, task.column_names)
        scores = [rows.number(value, index, "score") for index, value in enumerate(rows.column("score"))]
        _check_different(scores, rows.path, "score", "a rank correlation needs two different ones")


def _check_classification(task: Any, splits: Mapping[str, Rows]) -> None:
    """Texts with labels, of which the training split has two, and all of those that are scored."""
    train = splits.get(task.train_split)
    if train is None:
        folder = next(iter(splits.values())).path.parent
        raise UserError(
            f"{folder}: no {task.train_split}.jsonl, on which {task.metadata.name} fits its classifier",
            f"there are {', '.join(rows.path.name for rows in splits.values())}",
        )
    column = task.label_column_name
    for rows in [train, *scored_splits(task, splits)]:
        _check_texts(rows, [task.input_column_name])
    if isinstance(task, AbsTaskMultilabelClassification):
        return
    if isinstance(task, AbsTaskRegression):
        for rows in [train, *scored_splits(task, splits)]:
            values = [rows.number(value, index, column) for index, value in enumerate(rows.column(column))]
            _check_different(values, rows.path, column, "a regression needs two different ones")
        return
    taught = _labels(train, column)
    _check_different(taught, train.path, column, "a classifier needs two classes")
    known = set(taught)
    for rows in scored_splits(task, splits):
        for index, label in enumerate(_labels(rows, column)):
            if label not in known:
                raise UserError(f"{rows.place(index, column)} is {label!r}, a label that no row of {train.path.name} has")


def _check_clustering(task: Any, splits: Mapping[str, Rows]) -> None:
    """Texts with labels, of which there are two; of the older tasks, sets of texts with as many labels each."""
    column = task.label_column_name
    for rows in scored_splits(task, splits):
        _check_texts(rows, [task.input_column_name])
        if isinstance(task, AbsTaskClusteringLegacy) and isinstance(rows.column(column)[0], list):
            pairs = zip(rows.column(task.input_column_name), rows.column(column), strict=True)
            for index, (texts, labels) in enumerate(pairs):
                if len(texts) != len(labels):
                    raise UserError(f"{rows.place(index, column)} has {len(labels)} labels for {len(texts)} texts")
            continue
        _check_different(_labels(rows, column), rows.path, column, "clusters are judged by two labels")


def _check_pairs(task: Any, splits: Mapping[str, Rows]) -> None:
    """Pairs of texts, some of which say the same (1) and some do not (0)."""
    first, second, column = task.input1_column_name, task.input2_column_name, task.label_column_name
    for rows in scored_splits(task, splits):
        _check_texts(rows, [first, second])
        values = rows.column(column)
        nested = bool(values) and isinstance(values[0], list)
        flat = [(index, label) for index, value in enumerate(values) for label in (value if nested else [value])]
        for index, label in flat:
            if isinstance(label, str) or rows.number(label, index, column) not in (0, 1):
                raise UserError(f"{rows.place(index, column)} must be 0 or 1, got {label!r}")
        sides = zip(rows.column(first), rows.column(second), values, strict=True)
        for index, side in enumerate(sides):
            if nested and len({len(part) for part in side}) != 1:
                raise UserError(f"{rows.place(index, column)} and the texts of the row are lists of different lengths")
        _check_different([label for _, label in flat], rows.path, column, "average precision needs pairs of both kinds")


def _check_summaries(task: Any, splits: Mapping[str, Rows]) -> None:
    """Summaries by people and by machines, and how good people found each of the machines'."""
    machine, column = task.machine_summaries_column_name, task.relevancy_column_name
    for rows in scored_splits(task, splits):
        _check_texts(rows, [task.text_column_name, task.human_summaries_column_name, machine])
        differ = False
        for index, (summaries, values) in enumerate(zip(rows.column(machine), rows.column(column), strict=True)):
            grades = [rows.number(value, index, column) for value in values]
            if len(grades) != len(summaries):
                raise UserError(f"{rows.place(index, column)} has {len(grades)} grades for {len(summaries)} summaries")
            differ = differ or len(set(grades)) > 1
        if not differ:
            raise UserError(f"{rows.path}: {column!r} is the same for all summaries of each text; nothing can be ranked")


CHECKS: Sequence[tuple[type[AbsTask], Callable[[Any, Mapping[str, Rows]], None]]] = (
    (AbsTaskSTS, _check_sts),
    (AbsTaskClassification, _check_classification),
    (AbsTaskClustering, _check_clustering),
    (AbsTaskClusteringLegacy, _check_clustering),
    (AbsTaskPairClassification, _check_pairs),
    (AbsTaskSummarization, _check_summaries),
)
"""The check of each kind of task; retrieval is checked as it is read, by `local_data`."""


def check_unique(rows: Iterable[tuple[int, Mapping[str, Any]]], path: Path) -> None:
    """See that no two rows have the same `_id`.

    Raises:
        UserError: two have; names both lines.
    """
    seen: dict[str, int] = {}
    for number, row in rows:
        name = str(row["_id"])
        if isinstance(row["_id"], (list, dict)) or row["_id"] is None:
            raise UserError(f"{place_of(path, number)}: '_id' must be a string, got {row['_id']!r}")
        if name in seen:
            raise UserError(f"{place_of(path, number)}: '_id' {name!r} is that of {unit_of(path)} {seen[name]} too")
        seen[name] = number


def check_relevant(relevant: Mapping[str, Mapping[str, int]], path: Path) -> None:
    """See that a query has a document that answers it.

    Raises:
        UserError: there are no grades, or none is above 0.
    """
    if not relevant:
        raise UserError(f"{path}: grades no document of any query")
    if not any(grade > 0 for grades in relevant.values() for grade in grades.values()):
        raise UserError(f"{path}: no grade is above 0, so no document answers any query and every score is 0")
