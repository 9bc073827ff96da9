"""Runs a recipe from end to end: find, compress, evaluate, compare, measure, record. A stopped run continues where it was."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from compress.calibration.texts import CalibrationSource
from compress.common.errors import UserError
from compress.common.files import naming, replacing, sync_folder, write_text_atomic
from compress.common.inputs import open_file
from compress.common.journal import Journal
from compress.common.locks import LOCK, locked
from compress.common.ranks import Leader, Place
from compress.data.texts import measure_texts, texts_to_calibrate
from compress.layers.scheme import ActivationScheme
from compress.measure.accuracy.own_task import resolved as in_folder
from compress.measure.record import RECORD_FILE, Record, Step
from compress.measure.scored import versions_and_machine
from compress.measure.speed.timing import Speed
from compress.measure.vectors.fidelity import NEIGHBOURS, Fidelity
from compress.models.folder import ModelFolder
from compress.models.random_weights import PREFIX as RANDOM
from compress.models.source import check_original, find
from compress.pipeline.apply import make_variant
from compress.pipeline.cluster import run_among_ranks
from compress.pipeline.commit import JOURNAL, KEPT_FOLDERS, begin, commit, discard, tidy
from compress.pipeline.findings import RECIPE_FILE, VARIANT, Findings, assemble
from compress.pipeline.measuring import Measurements, check_prompts
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import WORDS, Recipe, check_name, steps_for
from compress.pipeline.recipe_file import read_recipe
from compress.pipeline.stage import BuildOptions
from compress.runtimes.contract import GRAPH_RUNTIMES, Kind, pick_runtime

if TYPE_CHECKING:
    from compress.measure.accuracy.tasks import Task


def run(
    recipe: Recipe | Path | str,
    *,
    model: str | None = None,
    data: Path | str | None = None,
    tasks: Sequence[str] | None = None,
    texts: str | None = None,
    output: Path | str = "results",
    device: str | None = None,
    fresh: bool = False,
    compress_only: bool = False,
    wait: bool = False,
    say: Callable[[str], None] | None = None,
) -> Record:
    """Run a recipe and write its folder under `output`.

    Args:
        recipe: a recipe, or the path of a recipe file.
        model: overrides the recipe's model.
        data: overrides `evaluate.data`.
        tasks: overrides `evaluate.tasks`.
        texts: overrides `measure.texts`.
        output: folder of the runs. A run is named after its recipe, its model and a hash of everything that decides its result.
        device: `cpu` or `cuda`; defaults to the GPU if there is one.
        fresh: discard an earlier run of the same name, instead of returning it or continuing it.
        compress_only: measure nothing; overrides `evaluate.tasks` and `measure.what`.
        wait: if another process works at the same run, wait until it is done; by default that is an error.
        say: called with a line as each step ends; by default the lines go to standard error.

    Where torchrun or Ray Train started several ranks, each calls this and gets the same record; see `compress.pipeline.cluster`.

    Raises:
        UserError: an error that a user can fix; where possible it is raised before anything is computed.
    """
    if tasks is not None and not tasks:
        raise UserError("no tasks are named", "--tasks takes mini, or names of mteb's tasks")
    read = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    check_name(read.name)
    resolved = _override(read, model, data, tasks, texts)
    if compress_only:
        resolved = _without_tasks(resolved, "fidelity", "speed")
    elif resolved.model.startswith(RANDOM) and tasks:
        raise UserError(f"model {resolved.model!r}: accuracy cannot be measured on random weights", "leave out --tasks")
    say = say or partial(print, file=sys.stderr, flush=True)
    work = _Work(resolved, Path(output), device, fresh, wait)
    place = Place.own()
    return work.done(say) if place is None else run_among_ranks(place, resolved, Path(output), work.done, say)


@dataclass(frozen=True)
class _Work:
    """A run that was asked for: by this process alone, or as the first of several ranks."""

    recipe: Recipe
    output: Path
    device: str | None
    fresh: bool
    wait: bool

    def done(self, say: Callable[[str], None], ranks: Leader | None = None) -> Record:
        return _Run(self.recipe, self.output, self.device, say, ranks).finish(self.fresh, self.wait)


def kept_record(recipe: Recipe, output: Path, device: str | None = None, source: ModelFolder | None = None) -> Record | None:
    """Return the record of a run that is complete under `output`; None where it still has to be run, or to be continued.

    Args:
        recipe: the recipe, with its model.
        output: folder of the runs.
        device: as for `run`.
        source: the recipe's model, if it is at hand: its files are read once for all its recipes.

    Raises:
        UserError: the run would be refused before anything is computed.
    """
    return _Run(recipe, output, device, lambda _: None, source=source).kept()


def _override(recipe: Recipe, model: str | None, data: Path | str | None, tasks: Sequence[str] | None, texts: str | None) -> Recipe:
    evaluate, measure = recipe.evaluate, recipe.measure
    if data is not None:
        evaluate = evaluate.model_copy(update={"data": str(data)})
    if tasks is not None:
        evaluate = evaluate.model_copy(update={"tasks": tuple(tasks)})
    if texts is not None:
        measure = measure.model_copy(update={"texts": texts})
    evaluate = evaluate.model_copy(update={"tasks": in_folder(evaluate.tasks, Path.cwd())})
    return recipe.model_copy(update={"model": model or recipe.model, "evaluate": evaluate, "measure": measure})


def _without_tasks(recipe: Recipe, *unmeasured: str) -> Recipe:
    """Return a recipe that evaluates no tasks, and leaves out of `measure.what` the names given."""
    what = tuple(part for part in recipe.measure.what if part not in unmeasured)
    evaluate, measure = recipe.evaluate.model_copy(update={"tasks": ()}), recipe.measure.model_copy(update={"what": what})
    return recipe.model_copy(update={"evaluate": evaluate, "measure": measure})


class _Run:
    """One run under way. The journal keeps each part as it ends."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        device: str | None,
        say: Callable[[str], None],
        ranks: Leader | None = None,
        source: ModelFolder | None = None,
    ) -> None:
        self.output, self.say, self.ranks = output, say, ranks
        self.source = source or find(recipe.model)
        check_original(self.source)
        self.shape = self.source.shape_to_compress
        self.recipe = self._resolved(recipe)
        # With the steps as they were written, by whose numbers errors name them.
        self.plan = make_plan(self.recipe.model_copy(update={"steps": recipe.steps}), self.shape, output)
        _check_writable(output)
        self.device = _device(device)
        evaluate, measure = self.recipe.evaluate, self.recipe.measure
        if "fidelity" in measure.what and measure.count <= NEIGHBOURS:
            raise UserError(
                f"measure.count: {measure.count} texts are too few: fidelity compares each text's {NEIGHBOURS} nearest neighbours",
                f"at least {NEIGHBOURS + 1}, or leave fidelity out of measure.what",
            )
        wanted = measure.what or evaluate.tasks  # tasks need texts too: to see whether float32 may stand in for float16
        self.texts = measure_texts(measure.texts, measure.count, recipe.seed) if wanted else []
        self.calibration = self._calibration()
        self._check_calibration()
        self.files = {name: digest(Path(name)) for step in self.recipe.methods for name in step.reads}
        self.tasks = _tasks(self.recipe)
        check_prompts(evaluate.prompts, self.tasks)
        kind = Kind(static=self.plan.static)
        self.runtime = pick_runtime(
            self.recipe.runtime,
            self.plan.quantized,
            device=self.device,
            dtype=self.recipe.dtype,
            kind=kind,
            widths=self.plan.widths,
        )
        self.fingerprint = self.source.fingerprint
        short = ("random-" if self.source.is_random else "") + self.source.name.split("/")[-1].split(",")[0].removeprefix(RANDOM)
        self.name = f"{recipe.name}-{short}-{self._identity()}"
        self.folder = output / f".{self.name}.partial"
        self.journal = Journal(self.folder / JOURNAL)

    def _resolved(self, recipe: Recipe) -> Recipe:
        """Fill in what depends on the model: the fold, each round's steps, and neither accuracy nor fidelity of random weights."""
        recipe = recipe.model_copy(update={"steps": steps_for(recipe, self.shape)})
        if not self.source.is_random or not (recipe.evaluate.tasks or "fidelity" in recipe.measure.what):
            return recipe
        self.say(f"{self.source.name}: random weights, so accuracy and fidelity are not measured")
        return _without_tasks(recipe, "fidelity")

    def _calibration(self) -> CalibrationSource | None:
        """Return the texts for steps that calibrate; None where no step does."""
        if not any(step.calibrates or step.surveys for step in self.recipe.methods):
            return None
        wanted = self.recipe.calibration
        texts = texts_to_calibrate(wanted.texts, wanted.count, self.recipe.seed)
        return CalibrationSource(texts, None if wanted.prompts == "model" else wanted.prompts, wanted.max_tokens)

    def _check_calibration(self) -> None:
        """See that the calibration texts suffice for the steps; say where they are few."""
        if self.calibration is None:
            return
        static = any(layer.activations is ActivationScheme.STATIC_PER_TENSOR for layer in self.plan.quantized.values())
        warning = self.calibration.check(self.source.tokenizer if static else None)
        if warning is not None:
            self.say(f"warning: {warning}")

    def _identity(self) -> str:
        """Hash everything that decides the result: another recipe, model, data, package set or machine is another run."""
        recipe = self.recipe.model_dump(mode="json", exclude={*WORDS, "model"})
        own = {str(task.folder): task.name for task in self.tasks}  # a folder that was moved is the same data
        recipe["evaluate"]["tasks"] = [own.get(name, name) for name in recipe["evaluate"]["tasks"]]
        decided = {
            "recipe": recipe,
            "model": self.fingerprint,
            "tasks": {task.name: task.fingerprint for task in self.tasks},
            "texts": self.texts,
            "files": self.files,
            "calibration": list(self.calibration.texts) if self.calibration else None,
            "device": self.device,
            "machine": versions_and_machine(self.device),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:8]

    def kept(self) -> Record | None:
        """Return the run's record if its folder is complete, with the variant and the layouts that the recipe wants."""
        final = self.output / self.name
        wanted = [RECORD_FILE, *({VARIANT, *self.recipe.export} if self.recipe.export else ())]
        whole = all((final / name).exists() for name in wanted) and not (final / JOURNAL).exists()  # else it is to be tidied
        return Record.read(final) if whole else None

    def finish(self, fresh: bool, wait: bool = False) -> Record:
        """Do what is not done yet, and give the run's folder its name; one process at a time.

        Raises:
            UserError: another process works at this run and `wait` is not set; or see `run`.
        """
        hint = "wait for it with --wait (wait=True in Python), or stop it"
        with locked(self.folder.with_name(f".{self.name}{LOCK}"), f"run {self.name}", wait=wait, hint=hint, say=self.say):
            return self._finish(self.output / self.name, fresh)

    def _finish(self, final: Path, fresh: bool) -> Record:
        if fresh:
            discard(final)
        begin(self.folder, fresh)
        tidy(final, KEPT_FOLDERS if self.recipe.export else KEPT_FOLDERS - {VARIANT})
        wanted = final / VARIANT if self.recipe.export else final
        if (final / RECORD_FILE).exists() and not wanted.exists():
            self.say(f"{final} is a record without its variant; running it again")
        elif (final / RECORD_FILE).exists():
            self.say(f"{final} is there already; --fresh runs it again")
            self._export(final)
            return Record.read(final)
        if self.journal.folder.exists():
            self.say(f"continuing {self.name}")
        for problem in self.plan.problems:
            self.say(f"warning: {problem}")
        with naming(self.journal.folder):
            self.journal.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.output)
        steps = tuple(Step(**step) for step in self.journal.once("steps", self._make_variant)["steps"])
        found = self._measured(steps)
        record = self._keep(assemble(self.name, self.recipe, self.source, self.shape, self.folder, self.device, found), final)
        self._export(final)
        return record

    def _make_variant(self) -> dict[str, Any]:
        """Write the variant, and the graph of a runtime that runs one; `steps` says what each step did."""
        target = self.folder / VARIANT
        options = BuildOptions(
            fingerprint=self.fingerprint,
            say=self.say,
            calibration=self.calibration,
            device=self.device,
            runtime=self.runtime,
            dtype=self.recipe.dtype,
            evaluated=self._evaluated,
            ranks=self.ranks,
        )
        done = make_variant(self.source, self.shape, self.recipe.methods, target, self.journal, options)
        if self.runtime in GRAPH_RUNTIMES:
            from compress.runtimes.lower import lower

            self.say(f"lowered for {self.runtime}: {lower(ModelFolder(self.name, target), self.runtime).name}")
        return {"steps": done}

    def _evaluated(self) -> frozenset[str]:
        if not self.tasks:
            return frozenset()
        from compress.measure.accuracy.tasks import evaluated_texts

        return evaluated_texts(self.tasks)

    def _measured(self, steps: tuple[Step, ...]) -> Findings:
        """Measure what the recipe asks for, in the order scores, index, fidelity, speed."""
        measurements = Measurements(
            name=self.name,
            recipe=self.recipe,
            source=self.source,
            fingerprint=self.fingerprint,
            shape=self.shape,
            plan=self.plan,
            variant=self.folder / VARIANT,
            tasks=self.tasks,
            texts=self.texts,
            device=self.device,
            journal=self.journal,
            say=self.say,
        )
        found = Findings(steps, "none: nothing was compared", {}, {}, None, {})
        what, once = self.recipe.measure.what, self.journal.once
        if self.tasks or "fidelity" in what:
            reference = measurements.reference()
            models = {"baseline": measurements.scored("baseline", reference.dtype), VARIANT: measurements.scored(VARIANT, None)}
            found = replace(found, baseline=f"{reference.dtype}: {reference.why}", scores=measurements.scores(models))
            found = replace(found, index=once("index", lambda: measurements.index(models["baseline"], models[VARIANT])))
            if "fidelity" in what:
                agreement = Fidelity(**once("fidelity", lambda: measurements.fidelity(models).model_dump()))
                self.say(f"fidelity: {agreement.in_short()}")
                found = replace(found, agreement=agreement)
            reference_scores = {name: roles["baseline"] for name, roles in found.scores.items()}
            found = replace(found, cuts=measurements.depths(models["baseline"], reference_scores))
            models.clear()
            gc.collect()
        if "speed" in what:
            found = replace(found, speeds={name: Speed(**speed) for name, speed in once("speed", measurements.speed).items()})
        return found

    def _export(self, final: Path) -> None:
        """Write the layouts of the recipe that are missing. The run is complete by then: a layout that is refused costs nothing."""
        from compress.export import export

        for layout in self.recipe.export:
            if layout != VARIANT and not (final / layout).exists():
                export(final / VARIANT, layout, final / layout, say=self.say)

    def _keep(self, record: Record, final: Path) -> Record:
        """Complete the run's folder and give it its name. The rename is the one moment from which on the run is done."""
        with replacing(self.folder / RECIPE_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
            YAML().dump(record.recipe, file)
        record.write(self.folder)
        for task in self.tasks:
            for role in ("baseline", VARIANT):
                kept = self.journal.get(f"accuracy {role} {task.name}")["mteb"]
                write_text_atomic(self.folder / "mteb" / role / f"{task.name}.json", json.dumps(kept, indent=1) + "\n")
        commit(self.folder, final)
        tidy(final, KEPT_FOLDERS if self.recipe.export else KEPT_FOLDERS - {VARIANT})
        return record


def _tasks(recipe: Recipe) -> list[Task]:
    """Find a recipe's tasks. A recipe without any runs where mteb is not installed, on a card's bare machine for one."""
    if not recipe.evaluate.tasks:
        return []
    from compress.measure.accuracy.tasks import find_tasks

    data = recipe.evaluate.data
    return find_tasks(recipe.evaluate.tasks, Path(data) if data else None)


def _check_writable(output: Path) -> None:
    """Make the folder of the runs, and check that a file can be written in it.

    Raises:
        UserError: it cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(f"results folder {output}: cannot be written ({error.strerror})", "give another one with --runs") from error


def digest(path: Path) -> str:
    """Return the SHA-256 of a file that a step reads, in hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _device(device: str | None) -> str:
    from compress.runtimes.torch_runtime import pick_device

    return str(pick_device(device))
