"""From two models to one verdict: may the new one search the old one's index, or does everything have to be embedded again?"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from compress.common.errors import UserError
from compress.common.files import is_taken, naming, replacing, sync_folder
from compress.common.inputs import checked
from compress.common.journal import Journal
from compress.common.locks import LOCK, locked
from compress.data.texts import is_hub
from compress.measure.accuracy.own_task import resolved
from compress.measure.accuracy.score import TaskScore
from compress.measure.accuracy.tasks import Task, evaluated_texts, find_tasks
from compress.measure.alignment import CrossScores, check_searches, judge, said
from compress.measure.evaluate import EvaluationOptions, scored_model
from compress.measure.record import Record, Step
from compress.measure.scored import Scored, versions_and_machine
from compress.methods.align.method import Align
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.pipeline.apply import make_variant
from compress.pipeline.commit import JOURNAL, KEPT_FOLDERS, begin, commit, tidy
from compress.pipeline.findings import RECIPE_FILE, VARIANT, Findings, assemble
from compress.pipeline.recipe import Evaluate, Gates, Measure, Recipe
from compress.pipeline.run import digest
from compress.pipeline.stage import BuildOptions
from compress.runtimes.contract import GRAPH_RUNTIMES, NUMPY, TORCH, Kind, pick_runtime

TASKS = ("MiniRetrieval",)
"""The retrieval of the embedded suite."""


@dataclass(frozen=True)
class AlignOptions:
    """How a model is aligned, and how it is judged."""

    texts: str
    """Texts that both models embed, like the queries to come; see `Align.texts`."""
    map: Literal["auto", "rotation", "linear"] = "auto"
    """The map; see `Align.map`."""
    minutes: float = 0.0
    """Minutes of training; see `Align.minutes`."""
    count: int | None = None
    """Number of texts to use; see `Align.count`."""
    tasks: Sequence[str] = TASKS
    """Retrieval tasks; see `compress.measure.accuracy.tasks.find_tasks`."""
    data: Path | str | None = None
    """Folder with the tasks' data; None: the data comes from the hub."""
    min_kept: float = 0.97
    """Least share of the old model's scores that has to be kept, from 0 to 1."""
    runtime: str | None = None
    """Runtime that the aligned model is made for; None: a variant's own, numpy for a static table, else torch."""
    device: str | None = None
    """Device of all models; None: the GPU if there is one."""
    seed: int = 0
    """Seed of everything that is sampled."""
    fresh: bool = False
    """Whether to begin again what an earlier call was stopped at."""


def align(new: str, to: str, folder: Path | str, options: AlignOptions, *, say: Callable[[str], None] | None = None) -> Record:
    """Align a model to another one, measure it on that model's index, and write a folder with the variant and the record.

    Args:
        new: the model that is to embed queries: a built-in name, a folder, a run, a variant or a hub name.
        to: the model that made the index, as `new`.
        folder: the folder to write; it appears once it is whole. A call that was stopped continues.
        options: texts, tasks and the like.
        say: called with a line as each step ends; by default the lines go to standard error.

    Returns:
        The record, with `alignment`.

    Raises:
        UserError: a model cannot be aligned (a Router, random weights), the tasks do not search, or the folder is
            taken.
    """
    return _Alignment(new, to, Path(folder), options, say or partial(print, file=sys.stderr, flush=True)).finish()


class _Alignment:
    """One alignment under way. The journal keeps each part as it ends."""

    def __init__(self, new: str, to: str, folder: Path, options: AlignOptions, say: Callable[[str], None]) -> None:
        self.new, self.to, self.folder, self.options, self.say = new, to, folder, options, say
        self.source, self.old = _original(find(new)), find(to)
        for model in (self.source, self.old):
            if model.routes is not None:
                raise model.routes.refusal()
            if model.is_random:
                raise UserError(f"model {model.name!r}: its weights are random, and its vectors mean nothing")
        if is_taken(folder):
            raise UserError(f"{folder}: already exists", "choose another folder, or delete this one")
        self.tasks: list[Task] = find_tasks(options.tasks, Path(options.data) if options.data else None)
        check_searches(self.tasks)
        self.recipe = self._recipe()
        self.device = _device(options.device)
        self.runtime = self._runtime()
        self.partial = folder.with_name(f".{folder.name}-{self._identity()}.partial")
        self.journal = Journal(self.partial / JOURNAL)

    def _recipe(self) -> Recipe:
        """Return what is done, as a recipe."""
        options = self.options
        asked = {"to": self.to, "texts": options.texts, "count": options.count, "map": options.map}
        step = checked({**asked, "minutes": float(options.minutes), "seed": options.seed}, Align, "compress align")
        return Recipe(
            name="align",
            model=self.new,
            seed=options.seed,
            steps=(step,),
            evaluate=Evaluate(
                tasks=resolved(options.tasks, Path.cwd()),
                data=str(options.data) if options.data else None,
                margin=1 - options.min_kept,
            ),
            measure=Measure(what=()),
            gates=Gates(retained=options.min_kept),
        )

    def _runtime(self) -> str:
        """Return the runtime that the variant is made for."""
        info = self.source.variant
        default = info.runtime if info else NUMPY if self.source.is_static else TORCH
        return pick_runtime(
            self.options.runtime or default,
            info.quantized if info else {},
            device=self.device,
            dtype=info.dtype if info else None,
            kind=Kind(static=self.source.is_static),
        )

    def _identity(self) -> str:
        """Hash everything that decides the result: what an earlier call has begun otherwise is not continued."""
        texts = self.options.texts
        decided = {
            "recipe": self.recipe.model_dump(mode="json"),
            "models": [self.source.fingerprint, self.old.fingerprint],
            "texts": texts if is_hub(texts) else digest(Path(texts)),
            "tasks": {task.name: task.fingerprint for task in self.tasks},
            "runtime": self.runtime,
            "device": self.device,
            "machine": versions_and_machine(self.device),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:8]

    def finish(self) -> Record:
        """Do what is not done yet, and give the folder its name; one process at a time."""
        hint = "wait for it, or stop it"
        with naming(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.partial.with_name(self.partial.name + LOCK), f"{self.folder}", hint=hint, say=self.say):
            begin(self.partial, self.options.fresh)
            with naming(self.journal.folder):
                self.journal.folder.mkdir(parents=True, exist_ok=True)
                sync_folder(self.folder.parent)
            steps = tuple(Step(**step) for step in self.journal.once("steps", self._make)["steps"])
            record = self._record(steps, self._scores())
            with replacing(self.partial / RECIPE_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
                YAML().dump(record.recipe, file)
            record.write(self.partial)
            commit(self.partial, self.folder)
            tidy(self.folder, KEPT_FOLDERS)
        return record

    def _make(self) -> dict[str, Any]:
        """Write the variant, and the graph of a runtime that runs one."""
        info, target = self.source.variant, self.partial / VARIANT
        build = BuildOptions(
            fingerprint=info.base_fingerprint if info else self.source.fingerprint,
            say=self.say,
            device=self.device,
            runtime=self.runtime,
            dtype=info.dtype if info else None,
            evaluated=lambda: evaluated_texts(self.tasks),
        )
        done = make_variant(self.source, self.source.shape_to_compress, self.recipe.methods, target, self.journal, build)
        if self.runtime in GRAPH_RUNTIMES:
            from compress.runtimes.lower import lower

            self.say(f"lowered for {self.runtime}: {lower(ModelFolder(self.source.name, target), self.runtime).name}")
        return {"steps": done}

    def _scores(self) -> CrossScores:
        """Score the three ways of searching on every task."""
        aligned = ModelFolder(self.source.name, self.partial / VARIANT)
        options = EvaluationOptions(data=self.options.data, device=self.device)
        with ExitStack() as stack:
            old, new, variant = (
                stack.enter_context(scored_model(model, options, None)) for model in (self.old, self.source, aligned)
            )
            ways: dict[str, Callable[[Task], TaskScore]] = {
                "old_on_old": old.score,
                "new_on_new": new.score,
                "new_on_old": lambda task: variant.queries_on(task, old),
            }
            found = {way: self._scored(way, score, (old, new, variant)) for way, score in ways.items()}
        return CrossScores(**found)

    def _scored(self, way: str, score: Callable[[Task], TaskScore], models: Sequence[Scored]) -> dict[str, TaskScore]:
        scores = {}
        for task in self.tasks:
            kept = self.journal.once(f"{way} {task.name}", lambda task=task: score(task).model_dump(mode="json"))  # type: ignore[misc]
            scores[task.name] = found = TaskScore(**kept)
            self.say(f"{way.replace('_', ' ')} {task.name}: {found.metric} {100 * found.score:.2f} ({found.seconds:.0f} s)")
        for model in models:
            model.embedder.close()
        return scores

    def _record(self, steps: tuple[Step, ...], scores: CrossScores) -> Record:
        """Build the record: the baseline is the old model on its own index, the variant the new one on that index."""
        judged = judge(self.old, scores, self.options.min_kept)
        found = Findings(
            steps=steps,
            baseline=f"{self.old.name} on its own index: what users have",
            scores={name: {"baseline": scores.old_on_old[name], VARIANT: scores.new_on_old[name]} for name in scores.old_on_old},
            index={name: {"new queries, new documents": score.score} for name, score in scores.new_on_new.items()},
            agreement=None,
            speeds={},
        )
        record = assemble(
            self.folder.name, self.recipe, self.source, self.source.shape_to_compress, self.partial, self.device, found
        )
        command = f"compress align {self.new} --to {self.to} --texts {self.options.texts}"
        changed = {
            "alignment": judged,
            "command": command,
            # Records of one model are compared where this is the same: scores on another model's index are not scores on its own.
            "measured_on": f"queries of {self.source.name} on the index of {self.old.name}",
            "verdict": said(judged),
        }
        return Record(**{**{name: getattr(record, name) for name in record.model_fields_set}, **changed})


def _original(found: ModelFolder) -> ModelFolder:
    """Return a model under the name that its variants carry: that of the model it was made from, where it is a variant."""
    return found if found.variant is None else ModelFolder(found.variant.base, found.path)


def _device(device: str | None) -> str:
    from compress.runtimes.torch_runtime import pick_device

    return str(pick_device(device))
