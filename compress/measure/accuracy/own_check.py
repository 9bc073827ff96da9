"""Says what is in a task of the user's own, once everything in it is found to be right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compress.data.tables import find_table, read_table
from compress.measure.accuracy.own_task import OwnTask, read_own_task
from compress.measure.accuracy.tasks import find_tasks


def check_own(folder: Path) -> str:
    """Load a task as an evaluation does, and describe it in a few lines.

    Raises:
        UserError: something in it is wrong; names file and line.
    """
    own = read_own_task(folder)
    (task,) = find_tasks([str(folder.resolve())], None)
    head = f"{own.name}: {own.type} in {own.language}, scored by {own.metric}"
    return "\n".join([head, *(f"  {line}" for line in _content(own, task.mteb)), f"  fingerprint {task.fingerprint}"])


def _content(own: OwnTask, task: Any) -> Iterator[str]:
    """Yield what the task has, in numbers."""
    if own.kind.mteb not in ("Retrieval", "Reranking"):
        for split, rows in task.dataset.items():
            yield f"{split}: {len(rows):,} rows{_labels(own, task, rows)}{'' if split in ('train', 'test') else ', not used'}"
        return
    data = task.dataset["default"]["test"]
    grades = [grade for of_query in data["relevant_docs"].values() for grade in of_query.values()]
    yield f"{len(data['corpus']):,} documents"
    yield f"{len(data['queries']):,} queries, with {len(grades):,} grades, {sum(grade > 0 for grade in grades):,} of them above 0"
    path = find_table(own.folder, "queries")
    without = len(read_table(path)) - len(data["queries"]) if path is not None else 0
    if without:
        yield f"{without:,} queries without a grade, which are left out"


def _labels(own: OwnTask, task: Any, rows: Any) -> str:
    """Say how many labels there are, where a type has classes or groups."""
    if own.type not in ("classification", "clustering"):
        return ""
    labels = (label[0] if isinstance(label, list) else label for label in rows[task.label_column_name])
    return f", {len(set(labels)):,} labels"
