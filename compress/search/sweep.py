"""Runs a sweep: every combination of values, or values drawn from ranges, and round by round only the best of them.

A sweep keeps nothing of its own. Its runs are the pipeline's, named after all that decides their results. So a sweep that was
killed finds those that are complete and continues those that are not, and its rounds and draws follow from their records.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.common.failures import WRONG
from compress.measure.record import GateResult, Record
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.pipeline.recipe import Recipe
from compress.reports.compare import Line, line_of
from compress.scale.units import Map, RayOptions
from compress.search.sweep_file import Plan, Point, Space
from compress.search.sweep_worker import Outcome, RunUnit, working

SPEED = "speed"


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep is done."""

    output: Path = Path("results")
    """Folder of the runs."""
    device: str | None = None
    """`cpu` or `cuda`; defaults to the GPU if there is one."""
    workers: int = 1
    """Runs that work at a time in processes of this machine. With Ray, its options say how many."""
    ray: RayOptions | None = None


@dataclass(frozen=True)
class Result:
    """A run of a sweep, as the last round that it was in left it."""

    point: Point
    round: int
    """Number of that round, from 0."""
    run: str = ""
    """Name of the run's folder; empty: it failed."""
    line: Line | None = None
    """Its figures; None: it failed."""
    missed: float = 0.0
    """How far gates are missed, as a share of their bounds, all together; 0: every gate that was judged is kept."""
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def model(self) -> str:
        """The model as the sweep names it."""
        return self.point.recipe.model


@dataclass(frozen=True)
class Swept:
    """What a sweep found."""

    results: tuple[Result, ...]
    """Each model's runs, the best first: those of the last round, then those that went in the round before, and so on."""
    failed: tuple[Result, ...]
    """Runs that failed."""
    best: str
    """What the best run has most of."""

    def of(self, model: str) -> list[Result]:
        """Return a model's runs, the best first."""
        return [result for result in self.results if result.model == model]

    @property
    def models(self) -> list[str]:
        """The models that have a run that did not fail."""
        return list(dict.fromkeys(result.model for result in self.results))

    @property
    def code(self) -> int:
        """Exit code: that of a failed run, the gravest; 1 if the best run of a model misses a gate; else 0."""
        if self.failed:
            return max(result.outcome.code for result in self.failed)
        return int(any(self.of(model)[0].missed > 0 for model in self.models))


def sweep(plan: Plan, options: SweepOptions = SweepOptions(), say: Callable[[str], None] = print) -> Swept:
    """Run a sweep; one that was stopped continues.

    Args:
        plan: the sweep, as `read_sweep` returns it.
        options: how it is done.
        say: called with a line as a run or a round ends.

    Raises:
        UserError: something is wrong with all of the sweep, or with a run before it computes anything. A run that fails later is in
            the result.
    """
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: at least one run at a time", "--workers 1")
    return _Sweep(plan, options, say).swept()


class _Sweep:
    """One sweep under way."""

    def __init__(self, plan: Plan, options: SweepOptions, say: Callable[[str], None]) -> None:
        self.plan, self.options, self.say = plan, options, say
        self.sources: dict[str, ModelFolder] = {}
        # Other machines have models and runtimes of their own: the run checks there, and sees whether it is complete.
        self.elsewhere = options.ray is not None and options.ray.address is not None

    def swept(self) -> Swept:
        """Do all rounds."""
        self._check()
        with working(self.options.workers, self.options.ray, lambda label, line: self.say(f"{label}: {line}")) as mapped:
            latest = self._drawn(mapped) if self.plan.drawn else self._done(self._grid(), 0, mapped)
            results = list(latest)
            for number in range(1, len(self.plan.rounds)):
                latest = self._done([result.point for result in self._survivors(latest, number - 1)], number, mapped)
                again = {id(result.point) for result in latest}
                results = [one for one in results if id(one.point) not in again] + latest
        numbers = {id(result): number for number, result in enumerate(results)}
        models = list(dict.fromkeys(space.base.model for space in self.plan.spaces))
        good = [result for result in results if result.line is not None]
        good.sort(key=lambda one: (models.index(one.model), -one.round, *self._rank(one), numbers[id(one)]))
        return Swept(tuple(good), tuple(one for one in results if one.line is None), self.plan.sweep.best)

    def _grid(self) -> list[Point]:
        return [point for space in self.plan.spaces for point in space.grid()]

    def _check(self) -> None:
        """Check, before anything runs, whatever a run checks before it computes: every run of the first round, one of later ones.

        Raises:
            UserError: one would be refused.
        """
        if self.elsewhere:
            return
        for number in range(len(self.plan.rounds)):
            for space in self.plan.spaces:
                points = [space.point(space.least())] if space.ranges else space.grid()
                for point in points if number == 0 else points[:1]:
                    try:
                        self._kept(self._recipe(point, number))
                    except UserError as error:
                        raise UserError(f"{point.label} on {point.recipe.model}: {error.message}", error.hint) from error

    def _recipe(self, point: Point, number: int) -> Recipe:
        """Return the recipe that a point is run with in a round.

        Before the last round nothing is kept but the record, and speed is measured only if the best run is to have it.
        """
        recipe, tasks = point.recipe, self.plan.rounds[number].tasks
        if tasks is not None:
            recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": tasks})})
        if number == len(self.plan.rounds) - 1:
            return recipe
        what = tuple(part for part in recipe.measure.what if part != SPEED or self.plan.sweep.best == SPEED)
        return recipe.model_copy(update={"measure": recipe.measure.model_copy(update={"what": what}), "export": ()})

    def _kept(self, recipe: Recipe) -> Record | None:
        """Return the record of a run that is complete; see `kept_record`."""
        from compress.pipeline.run import kept_record

        if recipe.model not in self.sources:
            self.sources[recipe.model] = find(recipe.model)
        return kept_record(recipe, self.options.output, self.options.device, self.sources[recipe.model])

    def _drawn(self, mapped: Map) -> list[Result]:
        """Do the first round with values drawn from ranges; all recipes on all models draw a batch at a time."""
        from compress.search.trials import Trials

        sweep = self.plan.sweep
        studies = [(space, Trials(space.lists, space.ranges, sweep.seed)) for space in self.plan.spaces]
        found: dict[str, Result] = {}
        for start in range(0, sweep.trials, sweep.batch):
            drawn = [
                (trials, trial, self._point(space, values, found))
                for space, trials in studies
                for trial, values in trials.draw(min(sweep.batch, sweep.trials - start))
            ]
            # In small spaces the same values are drawn again; they are the same run.
            new = {_key(point): point for _, _, point in drawn if _key(point) not in found}
            if new:
                found |= zip(new, self._done(list(new.values()), 0, mapped), strict=True)
            for trials, trial, point in drawn:
                result = found[_key(point)]
                trials.tell(trial, self._figure(result), result.missed)
        return list(found.values())

    def _point(self, space: Space, values: Mapping[str, Any], found: dict[str, Result]) -> Point:
        """Return the point of values that were drawn. Those between the ones that were checked may make no recipe: a failed run."""
        try:
            return space.point(values)
        except UserError as error:
            point = Point(space.base, space.label(values))
            found[_key(point)] = Result(point, 0, outcome=Outcome(code=WRONG, error=error.message))
            self.say(f"{point.label}: {self._said(found[_key(point)])}")
            return point

    def _done(self, points: Sequence[Point], number: int, mapped: Map) -> list[Result]:
        """Do the runs of a round that are not complete yet, and return the results of all, in the order of the points."""
        recipes = [self._recipe(point, number) for point in points]
        records = [None if self.elsewhere else self._kept(recipe) for recipe in recipes]
        # Other runs would slow down the one that is timed.
        alone = any(SPEED in recipe.measure.what for recipe in recipes)
        units = [
            self._unit(point, recipe, alone)
            for point, recipe, record in zip(points, recipes, records, strict=True)
            if record is None
        ]
        kept = f", {len(points) - len(units)} of them complete" if len(units) < len(points) else ""
        many = (self.options.ray.workers if self.options.ray else self.options.workers) > 1
        one_by_one = "; speed is measured, so one at a time" if alone and many and units else ""
        self.say(f"round {number + 1} of {len(self.plan.rounds)}: {len(points)} runs{kept}{one_by_one}")
        outcomes = iter(_one_by_one(mapped, units) if alone else mapped(units))
        results = []
        for point, record in zip(points, records, strict=True):
            result = self._result(point, number, record or next(outcomes))
            results.append(result)
            self.say(f"[{len(results)}/{len(points)}] {point.label}: {self._said(result)}")
        return results

    def _unit(self, point: Point, recipe: Recipe, alone: bool) -> RunUnit:
        """Return a run for a process, with its share of the cores if others work at the same time."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = self.options.workers > 1 and not alone and "OMP_NUM_THREADS" not in os.environ
        return RunUnit(
            label=point.label,
            recipe=recipe.model_dump(mode="json"),
            output=str(self.options.output.resolve()),
            device=self.options.device,
            folder=str(Path.cwd()),
            threads=max(1, cores // self.options.workers) if shared and self.options.ray is None else None,
        )

    def _result(self, point: Point, number: int, became: Record | Outcome) -> Result:
        if isinstance(became, Outcome) and not became.run:
            return Result(point, number, outcome=became)
        if isinstance(became, Outcome):
            became = self._read(became.run)
        missed = sum(_missed(gate) for gate in became.gates)
        return Result(point, number, became.run, line_of(became), missed)

    def _read(self, run: str) -> Record:
        """Read the record of a run that was just done.

        Raises:
            UserError: it is not here.
        """
        try:
            return Record.read(self.options.output / run)
        except UserError as error:
            hint = "the folder of the runs (--runs) has to be on a file system that all machines share" if self.elsewhere else ""
            raise UserError(error.message, error.hint or hint) from error

    def _figure(self, result: Result) -> float | None:
        """Return what the best run has most of; None where a run has no such figure."""
        line = result.line
        if line is None:
            return None
        figures = {"kept": line.kept, "cosine": line.cosine, "size": -float(line.bytes), SPEED: line.speedup}
        return figures[self.plan.sweep.best]

    def _rank(self, result: Result) -> tuple[Any, ...]:
        """Return by what runs are sorted: gates first, then the figure, then bytes."""
        figure, bytes = self._figure(result), math.inf if result.line is None else result.line.bytes
        return (result.line is None, result.missed > 0, math.inf if figure is None else -figure, bytes)

    def _survivors(self, results: Sequence[Result], number: int) -> list[Result]:
        """Return the results that go on, in the order in which they came, and say which do not."""
        going: set[int] = set()
        for model in dict.fromkeys(result.model for result in results):
            ranked = sorted((one for one in results if one.model == model and one.line is not None), key=self._rank)
            count = math.ceil(round(len(ranked) * self.plan.rounds[number].keep, 9))
            going |= {id(result) for result in ranked[:count]}
            out = ", ".join(result.point.label for result in ranked[count:]) or "none"
            self.say(f"{model}: {count} of {len(ranked)} go on to round {number + 2}; out: {out}")
        return [result for result in results if id(result) in going]

    def _said(self, result: Result) -> str:
        """Return what became of a run, for people."""
        if result.line is None:
            return "failed: " + result.outcome.error.replace("\n", "; ")
        line = result.line
        said = [f"{line.bytes / 1e6:.2f} MB"]
        said += [] if line.kept is None else [f"keeps {100 * line.kept:.2f} %"]
        said += [] if line.cosine is None else [f"cosine {line.cosine:.5f}"]
        said += [] if line.speedup is None else [f"{line.speedup:.2f} times as fast"]
        return ", ".join([*said, *(["misses gates"] if result.missed else [])])


def _key(point: Point) -> str:
    """Return what tells a point from others: its label, and all of its recipe."""
    return json.dumps([point.label, point.recipe.model_dump(mode="json")], sort_keys=True)


def _missed(gate: GateResult) -> float:
    """Return how far a gate is missed, as a share of its bound; at least a little if it is missed at all."""
    return 0.0 if gate.kept else max(abs(gate.value - gate.bound) / max(abs(gate.bound), 1e-9), 1e-9)


def _one_by_one(mapped: Map, units: Sequence[RunUnit]) -> Iterator[Outcome]:
    """Do runs so that none works while another one does."""
    for unit in units:
        yield from mapped([unit])


def describe(plan: Plan) -> Iterator[str]:
    """Yield lines that say what a sweep would run."""
    sweep = plan.sweep
    for number, one in enumerate(plan.rounds):
        tasks = "the recipes' own tasks" if one.tasks is None else ", ".join(one.tasks) or "no tasks"
        goes = "" if number == len(plan.rounds) - 1 else f"; the best {100 * one.keep:g} % of each model's runs go on"
        yield f"round {number + 1} of {len(plan.rounds)}: {tasks}{goes}"
    for space in plan.spaces:
        if space.ranges:
            yield f"{space.base.name} on {space.base.model}: {sweep.trials} trials of {', '.join([*space.lists, *space.ranges])}"
        else:
            yield from (f"{point.label} on {space.base.model}" for point in space.grid())
    best = "the smallest" if sweep.best == "size" else f"that with the highest {sweep.best}"
    yield f"{plan.runs} runs in the first round; the best run is {best}"
