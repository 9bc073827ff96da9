"""The one way every recipe goes: find, compress, evaluate, compare, measure, record. A stopped run goes on where it was."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML

from compress.calibration.texts import CalibrationSource
from compress.common.errors import UserError, nearest
from compress.common.files import write_text_atomic
from compress.common.journal import Journal
from compress.common.memory import available_memory_bytes, gigabytes
from compress.data.texts import calibration_texts, measure_texts, texts_to_calibrate
from compress.measure.record import RECORD_FILE, Record, Step
from compress.measure.scored import Scored, baseline_key, versions_and_machine
from compress.measure.speed.timing import Candidate, Speed, measure_speed
from compress.measure.vectors.codec import rotation
from compress.measure.vectors.fidelity import Fidelity, cosines, fidelity
from compress.models.folder import ModelFolder
from compress.models.random_weights import PREFIX as RANDOM
from compress.models.source import DTYPE_BYTES, find
from compress.pipeline.apply import make_variant
from compress.pipeline.findings import RECIPE_FILE, VARIANT, Findings, assemble
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe, steps_for
from compress.pipeline.recipe_file import read_recipe
from compress.runtimes.contract import GRAPH_RUNTIMES, pick_runtime
from compress.runtimes.loading import open_source

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore
    from compress.measure.accuracy.tasks import Task
    from compress.models.embedder import Embedder

JOURNAL = "journal"
# How closely float32 must agree with float16 to stand in for it, and on how many texts that is looked at.
STAND_IN_COSINE = 1 - 1e-4
STAND_IN_TEXTS = 32


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
    say: Callable[[str], None] | None = None,
) -> Record:
    """Run a recipe and leave its folder under `output`.

    Args:
        recipe: a recipe, or the path of one.
        model: overrides the recipe's model.
        data: overrides `evaluate.data`.
        tasks: overrides `evaluate.tasks`.
        texts: overrides `measure.texts`.
        output: folder of the runs; the run's own name follows from recipe, model and what else decides its result.
        device: `cpu` or `cuda`; by default the GPU where there is one.
        fresh: forget an earlier run of the same name, whole or stopped, instead of returning or continuing it.
        compress_only: measure nothing; overrides `evaluate.tasks` and `measure.what`.
        say: told each step as it ends, a line; by default they go to standard error.

    Raises:
        UserError: what a user can mend; found before anything is computed wherever possible.
    """
    if tasks is not None and not tasks:
        raise UserError("no tasks are named", "--tasks takes mini, or names of mteb's tasks")
    resolved = _override(recipe if isinstance(recipe, Recipe) else read_recipe(recipe), model, data, tasks, texts)
    if compress_only:
        nothing = {
            "evaluate": resolved.evaluate.model_copy(update={"tasks": ()}),
            "measure": resolved.measure.model_copy(update={"what": ()}),
        }
        resolved = resolved.model_copy(update=nothing)
    elif resolved.model.startswith(RANDOM) and tasks:
        raise UserError(f"model {resolved.model!r}: accuracy cannot be measured on random weights", "leave --tasks out")
    return _Run(resolved, Path(output), device, say or (lambda line: print(line, file=sys.stderr, flush=True))).finish(fresh)


def _override(recipe: Recipe, model: str | None, data: Path | str | None, tasks: Sequence[str] | None, texts: str | None) -> Recipe:
    evaluate, measure = recipe.evaluate, recipe.measure
    if data is not None:
        evaluate = evaluate.model_copy(update={"data": str(data)})
    if tasks is not None:
        evaluate = evaluate.model_copy(update={"tasks": tuple(tasks)})
    if texts is not None:
        measure = measure.model_copy(update={"texts": texts})
    return recipe.model_copy(update={"model": model or recipe.model, "evaluate": evaluate, "measure": measure})


@dataclass(frozen=True)
class _Reference:
    """The precision that accuracy and fidelity are compared with, and why that one."""

    dtype: str
    why: str


class _Run:
    """One run under way. Each part is kept by the journal as it ends."""

    def __init__(self, recipe: Recipe, output: Path, device: str | None, say: Callable[[str], None]) -> None:
        from compress.measure.accuracy.tasks import find_tasks

        self.output, self.say = output, say
        self.source = find(recipe.model)
        if self.source.variant is not None:
            raise UserError(
                f"model {recipe.model!r} is a variant that was compressed already",
                f"start from the model it was made from: {self.source.variant.base}",
            )
        self.shape = self.source.shape
        self.recipe = self._resolved(recipe)
        self.plan = make_plan(self.recipe, self.shape, output)
        _check_writable(output)
        evaluate, measure = self.recipe.evaluate, self.recipe.measure
        wanted = measure.what or evaluate.tasks  # tasks alone want texts too: to see whether float32 may stand in for float16
        self.texts = measure_texts(measure.texts, measure.count, recipe.seed) if wanted else []
        self.calibration = self._calibration()
        self.files = {name: _digest(Path(name)) for step in self.recipe.steps for name in step.reads}
        self.tasks: list[Task] = (
            find_tasks(evaluate.tasks, Path(evaluate.data) if evaluate.data else None) if evaluate.tasks else []
        )
        _check_prompts(evaluate.prompts, self.tasks)
        self.device = _device(device)
        self.runtime = pick_runtime(self.recipe.runtime, self.plan.quantized, device=self.device, dtype=self.recipe.dtype)
        self.fingerprint = self.source.fingerprint
        short = ("random-" if self.source.is_random else "") + self.source.name.split("/")[-1].split(",")[0].removeprefix(RANDOM)
        self.name = f"{recipe.name}-{short}-{self._identity()}"
        self.folder = output / f".{self.name}.partial"
        self.journal = Journal(self.folder / JOURNAL)

    def _resolved(self, recipe: Recipe) -> Recipe:
        """Fill in what depends on the model: the fold, and nothing of accuracy where the weights are random."""
        recipe = recipe.model_copy(update={"steps": steps_for(recipe, self.shape)})
        if not self.source.is_random or not (recipe.evaluate.tasks or "fidelity" in recipe.measure.what):
            return recipe
        self.say(f"{self.source.name}: random weights, so accuracy and fidelity are not measured")
        what = tuple(part for part in recipe.measure.what if part != "fidelity")
        evaluate, measure = recipe.evaluate.model_copy(update={"tasks": ()}), recipe.measure.model_copy(update={"what": what})
        return recipe.model_copy(update={"evaluate": evaluate, "measure": measure})

    def _identity(self) -> str:
        """Hash everything that decides the result: another recipe, model, data, package set or machine is another run."""
        decided = {
            "recipe": self.recipe.model_dump(mode="json", exclude={"name", "description", "model"}),
            "model": self.fingerprint,
            "tasks": {task.name: task.fingerprint for task in self.tasks},
            "texts": self.texts,
            "files": self.files,
            "calibration": list(self.calibration.texts) if self.calibration else None,
            "device": self.device,
            "machine": versions_and_machine(self.device),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:8]

    def finish(self, fresh: bool) -> Record:
        """Do what is not done yet, and give the run's folder its name."""
        final = self.output / self.name
        if fresh:
            shutil.rmtree(final, ignore_errors=True)
            shutil.rmtree(self.folder, ignore_errors=True)
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
        self.journal.folder.mkdir(parents=True, exist_ok=True)

        steps = tuple(Step(**step) for step in self.journal.once("steps", self._make_variant)["steps"])
        found = Findings(steps, "none: nothing was compared", {}, {}, None, {})
        what = self.recipe.measure.what
        if self.tasks or "fidelity" in what:
            reference = self._reference()
            found = replace(found, baseline=f"{reference.dtype}: {reference.why}")
            models = {"baseline": self._scored("baseline", reference.dtype), VARIANT: self._scored(VARIANT, None)}
            scores = self._scores(models)
            index = self.journal.once("index", lambda: self._index(models["baseline"], models[VARIANT]))
            found = replace(found, scores=scores, index=index)
            if "fidelity" in what:
                agreement = Fidelity(**self.journal.once("fidelity", lambda: self._fidelity(models).model_dump()))
                self.say(f"fidelity: {agreement.in_short()}")
                found = replace(found, agreement=agreement)
            models.clear()
            gc.collect()
        if "speed" in what:
            speeds = {name: Speed(**speed) for name, speed in self.journal.once("speed", self._speed).items()}
            found = replace(found, speeds=speeds)
        record = self._keep(assemble(self.name, self.recipe, self.source, self.shape, self.folder, self.device, found), final)
        self._export(final)
        return record

    def _calibration(self) -> CalibrationSource | None:
        """Return what steps that calibrate are shown; None where none does."""
        if not any(step.calibrates or step.surveys for step in self.recipe.steps):
            return None
        wanted = self.recipe.calibration
        texts = texts_to_calibrate(wanted.texts, wanted.count, self.recipe.seed)
        return CalibrationSource(texts, None if wanted.prompts == "model" else wanted.prompts, wanted.max_tokens)

    def _make_variant(self) -> dict[str, Any]:
        target = self.folder / VARIANT
        done = make_variant(
            self.source,
            self.shape,
            self.recipe.steps,
            self.fingerprint,
            target,
            self.journal,
            self.say,
            self.calibration,
            self.device,
            self.runtime,
            self.recipe.dtype,
            self._evaluated,
        )
        if self.runtime in GRAPH_RUNTIMES:
            from compress.runtimes.lower import lower

            self.say(f"lowered for {self.runtime}: {lower(ModelFolder(self.name, target), self.runtime).name}")
        return {"steps": done}

    def _evaluated(self) -> frozenset[str]:
        from compress.measure.accuracy.tasks import evaluated_texts

        return evaluated_texts(self.tasks)

    def _source(self, role: str) -> ModelFolder:
        return ModelFolder(f"{self.name} {role}", self.folder / VARIANT) if role == VARIANT else self.source

    def _open(self, role: str, dtype: str | None) -> Embedder:
        source = self._source(role)
        needed = self.plan.variant_bytes if role == VARIANT else self.shape.parameters * DTYPE_BYTES[dtype or "float32"]
        stream = not self._fits(needed)
        if stream:
            self.say(f"{role}: {gigabytes(needed)} do not fit in memory; read block by block")
        return open_source(source, device=self.device, dtype=dtype, stream=stream)

    def _fits(self, needed: int) -> bool:
        """Whether so many bytes of weights fit beside what running takes; a GPU is left to say so itself."""
        return self.device != "cpu" or needed + self.plan.run_memory_bytes - self.plan.variant_bytes < available_memory_bytes()

    def _reference(self) -> _Reference:
        """Choose the baseline's precision: float16, or float32 in its place on a CPU once both are seen to agree."""
        asked = self.recipe.evaluate.baseline
        if asked != "auto":
            return _Reference(asked, "as the recipe says")
        if self.device != "cpu":
            return _Reference("float16", "half precision, as the model is published to run")
        return _Reference(**self.journal.once("reference", self._stand_in))

    def _stand_in(self) -> dict[str, Any]:
        texts = self.texts[:STAND_IN_TEXTS]
        halves = (self._scored("baseline", dtype).embedder for dtype in ("float16", "float32"))
        vectors = []
        for embedder in halves:
            vectors.append(embedder.encode(texts))
            embedder.close()
        worst = float(cosines(*vectors).min())
        agree = worst >= STAND_IN_COSINE
        why = f"{'stands in for' if agree else 'used, because float32 differs from'} float16: " + (
            f"lowest cosine between the two {worst:.7f} on {len(texts)} of the run's texts"
        )
        return {"dtype": "float32" if agree else "float16", "why": why}

    def _scored(self, role: str, dtype: str | None) -> Scored:
        """Return a model as tasks see it: the baseline's vectors and scores are kept for other runs, the variant's for this one."""
        batch_tokens, source = self.recipe.measure.batch_tokens, self._source(role)
        kept = self.journal.folder / "vectors"
        key = kept if role == VARIANT else baseline_key(self.fingerprint, dtype, self.device, batch_tokens)
        return Scored(
            source, partial(self._open, role, dtype), key, batch_tokens=batch_tokens, prompts=self.recipe.evaluate.prompts
        )

    def _scores(self, models: Mapping[str, Scored]) -> dict[str, dict[str, TaskScore]]:
        """Score baseline, then variant, on every task; only one of the two is in memory at a time."""
        if not self.tasks:
            return {}
        from compress.measure.accuracy.score import TaskScore

        scores: dict[str, dict[str, TaskScore]] = {}
        for role, model in models.items():
            for number, task in enumerate(self.tasks, start=1):
                make = partial(self._score, model, task)
                score = TaskScore(**self.journal.once(f"accuracy {role} {task.name}", make))
                scores.setdefault(task.name, {})[role] = score
                place = f"{number}/{len(self.tasks)}"
                self.say(f"{role} {place} {task.name}: {score.metric} {100 * score.score:.2f} ({score.seconds:.0f} s)")
            model.embedder.close()
        return scores

    @staticmethod
    def _score(model: Scored, task: Task) -> dict[str, Any]:
        return model.score(task).model_dump(mode="json")

    def _index(self, baseline: Scored, variant: Scored) -> dict[str, dict[str, float]]:
        """Score retrieval with one model's queries on the other's documents."""
        found: dict[str, dict[str, float]] = {}
        if baseline.embedder.dimension != variant.embedder.dimension:
            return found
        turn = None
        if self.recipe.evaluate.rotation:
            turn = rotation(*(model.embedder.encode(calibration_texts()) for model in (variant, baseline)))
        for task in self.tasks:
            if task.mteb.metadata.type != "Retrieval":
                continue
            found[task.name] = {
                "variant queries, baseline documents": variant.score_on(task, baseline),
                "baseline queries, variant documents": baseline.score_on(task, variant),
            }
            if turn is not None:
                found[task.name]["rotated variant queries, baseline documents"] = variant.score_on(task, baseline, turn)
                found[task.name]["rotated baseline queries, variant documents"] = baseline.score_on(task, variant, turn.T)
            self.say(f"index {task.name}: " + "; ".join(f"{pair} {100 * score:.2f}" for pair, score in found[task.name].items()))
        return found

    def _fidelity(self, models: Mapping[str, Scored]) -> Fidelity:
        vectors = []
        for model in models.values():
            vectors.append(model.embedder.encode(self.texts))
            model.embedder.close()
        return fidelity(vectors[0], vectors[1], self.texts)

    def _speed(self) -> dict[str, Any]:
        """Measure baselines and variant in fresh processes."""
        candidates = {
            dtype: Candidate({"model": str(self.source.path), "device": self.device, "dtype": dtype})
            for dtype in self._dtypes_that_fit()
        }
        candidates[VARIANT] = Candidate({"model": str(self.folder / VARIANT), "device": self.device})
        measure = self.recipe.measure
        self.say(f"speed: {', '.join(candidates)}, {measure.rounds} rounds of {measure.count} texts, each in a process of its own")
        speeds = measure_speed(
            candidates,
            self.texts,
            rounds=measure.rounds,
            requests=measure.requests,
            batch_tokens=measure.batch_tokens,
            cells=[(batch, length) for batch in measure.batches for length in measure.lengths],
            threads=measure.threads,
        )
        return {name: speed.model_dump() for name, speed in speeds.items()}

    def _dtypes_that_fit(self) -> list[str]:
        """Leave out baselines that do not fit in memory beside the variant, the largest first; all are held at once."""
        dtypes = list(self._dtypes())
        while dtypes and not self._fits(
            self.plan.variant_bytes + sum(self.shape.parameters * DTYPE_BYTES[dtype] for dtype in dtypes)
        ):
            largest = max(dtypes, key=DTYPE_BYTES.__getitem__)
            self.say(f"speed: the {largest} baseline does not fit in memory beside the others; it is left out")
            dtypes.remove(largest)
        if not dtypes and not self._fits(self.plan.variant_bytes):
            raise UserError(f"speed: the variant's {gigabytes(self.plan.variant_bytes)} do not fit in memory", "measure.what: []")
        return dtypes

    def _dtypes(self) -> tuple[str, ...]:
        """Precisions that speed is compared with; the first is the one that gates look at.

        bfloat16 only where the CPU multiplies it; elsewhere it is several times slower than float32 and no baseline at all.
        """
        if self.device != "cpu":
            return ("float16",)
        import torch

        from compress.layers.float_layers import has_onednn_linear

        return ("float32", "bfloat16") if has_onednn_linear(torch.bfloat16) else ("float32",)

    def _export(self, final: Path) -> None:
        """Write the layouts of the recipe that are not there yet. The run is whole before: one that is refused costs nothing."""
        from compress.export import export

        for layout in self.recipe.export:
            if layout != VARIANT and not (final / layout).exists():
                export(final / VARIANT, layout, final / layout, say=self.say)

    def _keep(self, record: Record, final: Path) -> Record:
        """Complete the run's folder and give it its name."""
        with (self.folder / RECIPE_FILE).open("w", encoding="utf-8") as file:
            YAML().dump(record.recipe, file)
        record.write(self.folder)
        for task in self.tasks:
            for role in ("baseline", VARIANT):
                kept = self.journal.get(f"accuracy {role} {task.name}")["mteb"]
                write_text_atomic(self.folder / "mteb" / role / f"{task.name}.json", json.dumps(kept, indent=1) + "\n")
        if not self.recipe.export:
            shutil.rmtree(self.folder / VARIANT)
        shutil.rmtree(self.journal.folder)
        shutil.rmtree(final, ignore_errors=True)  # a record whose variant was taken away
        self.folder.rename(final)
        return record


def _check_prompts(prompts: Mapping[str, str], tasks: Sequence[Task]) -> None:
    """See that every prompt of the recipe is one that a task of the run looks for.

    Raises:
        UserError: one is not.
    """
    roles = ("query", "document")
    owners = {name for task in tasks for name in (task.name, task.mteb.metadata.type)}
    known = owners | {f"{owner}-{role}" for owner in owners for role in roles} | set(roles)
    for name in prompts:
        if name not in known:
            raise UserError(f"evaluate.prompts: no task of this run looks for {name!r}", nearest(name, sorted(known)))


def _check_writable(output: Path) -> None:
    """Make the folder of the runs, and see that a file can be made in it.

    Raises:
        UserError: it cannot.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise UserError(
            f"results folder {output}: cannot be written ({error.strerror})", "give another one with --output"
        ) from error


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file that a step reads.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _device(device: str | None) -> str:
    from compress.runtimes.torch_runtime import pick_device

    return str(pick_device(device))
