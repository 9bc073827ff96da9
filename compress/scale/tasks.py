"""An evaluation whose tasks are scored by workers of Ray: a task is a unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress.common.errors import UserError
from compress.measure.accuracy.own_task import resolved
from compress.measure.evaluate import Evaluation, EvaluationOptions, evaluate, named_model
from compress.measure.scored import Scored
from compress.runtimes.remote import is_url
from compress.scale.units import RayOptions, working

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore


@dataclass(frozen=True)
class ScoreTask:
    """A unit: a model on a task."""

    model: str
    runtime: str | None
    task: str


class Scorer:
    """Scores models on tasks. Vectors and scores are kept in the cache of the machine that works, as those of other evaluations."""

    def __init__(self, tasks: Sequence[str], options: EvaluationOptions) -> None:
        from compress.measure.accuracy.tasks import find_tasks

        self._options = options
        self._tasks = {task.name: task for task in find_tasks(tasks, Path(options.data) if options.data else None)}
        self._models: dict[tuple[str, str | None], Scored] = {}

    def __call__(self, unit: ScoreTask) -> TaskScore:
        """Score a model on a task."""
        key = (unit.model, unit.runtime)
        if key not in self._models:
            for other in self._models.values():
                other.embedder.close()
            self._models[key] = named_model(unit.model, unit.runtime, self._options)
        return self._models[key].score(self._tasks[unit.task])


def make_scorer(tasks: Sequence[str], options: EvaluationOptions) -> Scorer:
    """Make the worker that scores models on tasks."""
    return Scorer(tasks, options)


def evaluate_many(
    model: str,
    tasks: Sequence[str],
    options: EvaluationOptions | None = None,
    *,
    ray: RayOptions,
    against: str | None = None,
    say: Callable[[str], None] = print,
) -> Evaluation:
    """Score a model on tasks as `compress.measure.evaluate.evaluate` does, each task by a worker of Ray.

    Raises:
        UserError: see `evaluate`; or a model is a server, or vector formats are asked for, which are scored in this process.
    """
    options = options or EvaluationOptions()
    if options.vector_formats:
        raise UserError("--vector-formats: are scored in one process", "leave out --ray, or --vector-formats")
    if server := next((name for name in (against, model) if name is not None and is_url(name)), None):
        raise UserError(f"--ray: {server} is a server, which divides its work itself", "leave out --ray")
    there = replace(options, data=None if options.data is None else Path(options.data).resolve())
    with working(partial(make_scorer, list(resolved(tasks, Path.cwd())), there), ray) as mapped:

        def elsewhere(name: str, runtime: str | None, found: Sequence[str]) -> Iterator[TaskScore]:
            folder = str(Path(name).resolve()) if Path(name).is_dir() else name
            return mapped(ScoreTask(folder, runtime, task) for task in found)

        return evaluate(model, tasks, options, against=against, elsewhere=elsewhere, say=say)
