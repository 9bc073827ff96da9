"""Search: from bounds on size, speed and accuracy to a recipe that keeps them, and the record of why it is this one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from compress.common.cache import use
from compress.common.errors import UserError
from compress.common.files import replacing, write_text_atomic
from compress.common.journal import Journal
from compress.common.locks import locked
from compress.common.memory import gigabytes
from compress.measure.accuracy.own_task import resolved
from compress.measure.record import Record
from compress.measure.sensitivity import Sensitivity
from compress.models.folder import ModelFolder
from compress.pipeline.recipe import Calibration, Evaluate, Gates, Recipe
from compress.search.assemble import Chosen
from compress.search.choices import AS_STORED, DROPPED, WIDTHS, bytes_of
from compress.search.groups import TABLE, WHOLE
from compress.search.items import BYTES, FLOAT32, MS, WHOLE_MODEL, items_of
from compress.search.knapsack import Item, Point, Problem, front, solve, total
from compress.search.making import Maker
from compress.search.prediction import Agreement, agreement, cosine_loss
from compress.search.sensitivity import SensitivityOptions, Subject, sensitivity_of

ADDITIVE = 0.9
"""Least R2, after the best line through the origin, at which sums of scores are trusted; below it scores are taken anew."""


@dataclass(frozen=True)
class Bounds:
    """What a recipe has to keep; at least one."""

    max_bytes: float | None = None
    """Most bytes of the variant's weights, as its file has them."""
    min_speedup: float | None = None
    """Least throughput over that of the model in float32."""
    min_kept: float | None = None
    """Least share of the baseline's mean score, in percent, by the lower end of its interval."""


@dataclass(frozen=True)
class SearchOptions:
    """How a search is done."""

    scoring: SensitivityOptions = field(default_factory=partial(SensitivityOptions, per="layer"))
    trials: int = 12
    """Random assignments on which sums of scores are compared with measurements."""
    candidates: int = 3
    """Solutions that are made and compared on held-out texts."""
    tasks: tuple[str, ...] = ()
    """Tasks that the result is scored on; empty: none, unless a bound needs them."""
    data: str | None = None
    name: str = "searched"
    table: bool = True
    """Whether the token table is searched; otherwise it is stored in int8."""
    points: int = 12
    """Points of the front."""


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    recipe: Recipe
    why: dict[str, Any]
    """What was predicted and measured, for the record."""


def search(model: str, bounds: Bounds, options: SearchOptions = SearchOptions(), say: Callable[[str], None] = print) -> Found:
    """Find the recipe with the least loss within bounds; with `min_kept` alone, or next to them, the smallest that keeps it.

    Args:
        model: a built-in name, a folder or a hub name.
        bounds: what the recipe has to keep.
        options: how the search is done.
        say: called with a line of progress.

    Raises:
        UserError: nothing keeps the bounds, or the model cannot be compressed.
    """
    if bounds == Bounds():
        raise UserError("no bound is given", "give --max-size, --min-speedup or --min-kept, or several")
    return _Search(Subject(model, options.scoring, say), bounds, options).found()


def maker_of(subject: Subject) -> Maker:
    """Return what makes a subject's variants and measures them on its held-out texts."""
    return Maker(
        source=subject.source,
        shape=subject.shape,
        choices=subject.choices,
        calibration=subject.sourced(subject.texts.calibration),
        texts=subject.texts.held_out,
        folder=use("search", f"{subject.key}-made"),
        exact=subject.exact,
        runtime=subject.options.runtime,
        device=subject.options.device,
    )


class _Search:
    """One search. Whatever takes long is kept in the cache, so that a search that was killed continues and ends the same."""

    def __init__(self, subject: Subject, bounds: Bounds, options: SearchOptions) -> None:
        self.subject, self.bounds, self.options, self.say = subject, bounds, options, subject.say
        decided = json.dumps([subject.key, asdict(bounds), options.trials, options.candidates, options.table, options.points])
        self.folder = use("search", hashlib.sha256(decided.encode()).hexdigest()[:16])
        self.journal = Journal(self.folder, checked=True)
        self.maker = maker_of(subject)

    @cached_property
    def record(self) -> Sensitivity:
        """The scores."""
        return sensitivity_of(self.subject)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes in the variant's file that no choice is about."""
        shape = self.subject.shape
        apart = ((group, offered) for group, offered in self.subject.choices.items() if group.kind == WHOLE or group.block is None)
        # The first choice leaves a group as it is; see `choices_for`.
        return shape.as_stored().file_bytes - sum(bytes_of(offered[0], group, shape) for group, offered in apart)

    def problem(self, scores: Mapping[str, Mapping[str, float]]) -> Problem:
        """Return the knapsack of these scores."""
        losses = {group.name: {**group.losses, **scores[group.name]} for group in self.record.groups}
        items = [replace(item, loss=losses[item.group][item.choice]) for item in self.items]
        return Problem(items, (BYTES,) if self.bounds.min_speedup is None else (BYTES, MS))

    @cached_property
    def items(self) -> list[Item]:
        """The knapsack's items, without losses."""
        choices = dict(self.subject.choices)
        if not self.options.table:
            tables = [group for group in choices if group.kind == TABLE]
            choices |= {group: tuple(choice for choice in choices[group] if choice.name == "int8") for group in tables}
        times = self.times if self.bounds.min_speedup is not None else None
        return items_of(choices, self.subject.shape, self.subject.options.runtime, times)

    @cached_property
    def times(self) -> dict[str, dict[str, float]]:
        """The measured milliseconds of each choice of each group."""
        from compress.search.timing import milliseconds

        def measured() -> dict[str, Any]:
            try:
                return {"ms": milliseconds(self.subject, lambda: ModelFolder("plain", self.maker.variant({})))}
            finally:
                self.maker.forget({})

        kept: dict[str, dict[str, float]] = self.journal.once("milliseconds", measured)["ms"]
        return kept

    def limits(self) -> dict[str, float]:
        """Return the bounds on the knapsack's costs.

        Raises:
            UserError: the model without its layers is larger or slower already.
        """
        found: dict[str, float] = {}
        if self.bounds.max_bytes is not None:
            found[BYTES] = self.bounds.max_bytes - self.fixed_bytes
            if found[BYTES] <= 0:
                raise UserError(
                    f"--max-size {gigabytes(int(self.bounds.max_bytes))}: what no choice is about takes "
                    f"{gigabytes(self.fixed_bytes)} already",
                    "raise it",
                )
        if self.bounds.min_speedup is not None:
            whole = self.times[WHOLE_MODEL]
            inside = sum(self.times[group.name][AS_STORED] for group in self.subject.choices if group.kind not in (TABLE, WHOLE))
            rest = max(whole[AS_STORED] - inside, 0.0)
            found[MS] = whole[FLOAT32] / self.bounds.min_speedup - rest
            if found[MS] <= 0:
                raise UserError(
                    f"--min-speedup {self.bounds.min_speedup:g}: what no choice is about takes {rest:.2f} ms already, and all of "
                    f"float32 {whole[FLOAT32]:.2f} ms",
                    "lower it, or search with another --runtime",
                )
        return found

    def found(self) -> Found:
        """Search; see `search`."""
        with locked(self.folder / "lock", f"search of {self.subject.source}", wait=True, hint="", say=self.say):
            return self._found()

    def _found(self) -> Found:
        limits = self.limits()
        problem = self.problem(self.record.scores)
        along = MS if MS in limits and BYTES not in limits else BYTES
        smallest = solve(problem, limits, least=along)
        if smallest is None:
            raise UserError("no choices keep these bounds together", "raise --max-size, or lower --min-speedup")
        additive = self._additivity(problem)
        why: dict[str, Any] = {"bounds": asdict(self.bounds), "additivity": asdict(additive)}
        self.say(
            f"sums of scores against {self.options.trials} measured assignments: R2 {additive.r2:.3f}, with a slope of "
            f"{additive.slope:.2f} {additive.r2_fitted:.3f}"
        )
        points = front(problem, along, limits, self.options.points)
        why["front"] = [self._said(point, additive.slope) for point in points]
        if self.bounds.min_kept is not None:
            chosen, record = self._smallest_kept(points)
            why["kept"] = record
        else:
            chosen = self._best(problem, limits, additive, why)
        why["predicted"] = self._predicted(problem, chosen, additive.slope)
        why["measured"] = self.maker.loss(chosen)
        why["bytes"] = int(total(problem, chosen, BYTES)) + self.fixed_bytes
        why["chosen"] = dict(chosen)
        return Found(self.recipe(chosen, why), why)

    def _predicted(self, problem: Problem, chosen: Chosen, slope: float) -> float:
        return slope * cosine_loss(total(problem, chosen, "loss"))

    def _said(self, point: Point, slope: float) -> dict[str, float]:
        said = {"bytes": int(point.costs[BYTES]) + self.fixed_bytes, "predicted": slope * cosine_loss(point.loss)}
        return said | ({MS: point.costs[MS]} if MS in point.costs else {})

    def _additivity(self, problem: Problem) -> Agreement:
        """Compare sums of scores with measurements of random assignments."""
        generator = np.random.default_rng(self.subject.options.seed)
        predictions, measured = [], []
        for number in range(self.options.trials):
            chosen = _drawn(problem, generator)
            predictions.append(cosine_loss(total(problem, chosen, "loss")))
            measured.append(self.maker.loss(chosen))
            self.say(f"trial {number + 1}: loss {measured[-1]:.4f}, predicted {predictions[-1]:.4f}")
        if len(measured) < 2:
            return Agreement(1.0, 1.0, 1.0, 1.0)
        return agreement(predictions, measured)

    def _best(self, problem: Problem, limits: Mapping[str, float], additive: Agreement, why: dict[str, Any]) -> Chosen:
        """Return the best of a few solutions on held-out texts; where sums are not to be trusted, also of scores taken anew."""
        solutions = self._solutions(problem, limits)
        if additive.r2_fitted < ADDITIVE:
            self.say(f"sums of scores explain less than R2 {ADDITIVE}: scores are taken anew around the solution")
            anew = self._problem_around(solutions[0])
            solutions += [one for one in self._solutions(anew, limits) if one not in solutions]
            why["anew"] = True
        losses = [self.maker.loss(chosen) for chosen in solutions]
        why["candidates"] = [
            {"measured": loss, "predicted": self._predicted(problem, chosen, additive.slope)}
            for chosen, loss in zip(solutions, losses, strict=True)
        ]
        return solutions[losses.index(min(losses))]

    def _solutions(self, problem: Problem, limits: Mapping[str, float]) -> list[dict[str, str]]:
        """Return the best solutions, each unlike those before it in at least a tenth of its groups, and in two."""
        found: list[dict[str, str]] = []
        for _ in range(max(1, self.options.candidates)):
            apart = [(one, max(2, len(one) // 10)) for one in found]
            chosen = solve(problem, limits, unlike=apart)
            if chosen is None:
                break
            found.append(chosen)
        return found

    def _problem_around(self, chosen: Chosen) -> Problem:
        """Return the knapsack with scores around a solution. What cannot be scored there keeps its score."""
        if any(choice == DROPPED or choice in WIDTHS for choice in chosen.values()):
            self.say("the solution leaves out or narrows blocks, around which no scores can be taken: the first ones stay")
            return self.problem(self.record.scores)
        key = f"around-{self.maker.key(chosen)}"
        changes = self.journal.once(key, lambda: self._changes(chosen, self.folder / key))
        scores = {
            group.name: {
                choice: group.losses[chosen.get(group.name, AS_STORED)] + change
                for choice, change in changes.get(group.name, {}).items()
            }
            for group in self.record.groups
        }
        return self.problem(scores)

    def _changes(self, chosen: Chosen, folder: Path) -> dict[str, dict[str, float]]:
        """Return how the loss of a solution changes with another choice for one of its groups."""
        from compress.search.scores import score
        from compress.search.scoring import Around, Passages, Scoring

        subject, options = self.subject, self.subject.options
        passages = Passages(
            calibration=subject.sourced(subject.texts.calibration),
            scored=subject.sourced(subject.texts.scored),
            directions=options.directions,
            forward=options.forward,
            seed=options.seed,
            device=options.device,
        )
        around = Around(self.maker.variant(chosen), chosen)
        found = score(Scoring(subject.source, subject.shape, subject.choices, passages, Journal(folder), subject.exact, around))
        self.maker.forget(chosen)
        for large in ("gradients", "texts"):
            shutil.rmtree(folder / large, ignore_errors=True)
        return found

    def _smallest_kept(self, points: Sequence[Point]) -> tuple[Chosen, dict[str, Any]]:
        """Return the cheapest solution of the front that keeps the score, found by halving.

        Raises:
            UserError: none does.
        """
        low, high = 0, len(points)
        best: tuple[Chosen, dict[str, Any]] | None = None
        while low < high:
            middle = (low + high) // 2
            record = self.scored(points[middle].chosen)
            gate = next(gate for gate in record.gates if gate.name == "retained")
            self.say(f"{self._said(points[middle], 1.0)['bytes'] / 1e6:.1f} MB keeps {100 * gate.value:.2f} % at the least")
            if gate.kept:
                best = points[middle].chosen, {"at_least": gate.value, "retained": record.retained, "run": record.run}
                high = middle
            else:
                low = middle + 1
        if best is None:
            raise UserError(
                f"--min-kept {self.bounds.min_kept:g}: nothing within the other bounds keeps it, by the lower end of the interval",
                "lower it, give more tasks (a wide interval keeps little), or loosen the other bounds",
            )
        return best

    def scored(self, chosen: Chosen) -> Record:
        """Run an assignment's recipe on the tasks; what was run before is read."""
        from compress.pipeline.run import run

        recipe = self.recipe(chosen, {})
        measured = recipe.measure.model_copy(update={"what": ("fidelity",)})
        run_recipe = recipe.model_copy(update={"measure": measured, "export": ()})
        return run(run_recipe, output=self.folder / "runs", device=self.subject.options.device, say=lambda _: None)

    def recipe(self, chosen: Chosen, why: Mapping[str, Any]) -> Recipe:
        """Return the recipe of an assignment, with the bounds as gates."""
        options, source = self.options, self.subject.source
        kept = None if self.bounds.min_kept is None else self.bounds.min_kept / 100
        described = f"found for {source.name}"
        if why:
            described += f": {why['bytes'] / 1e6:.1f} MB, 1 - cosine {why['measured']:.4f} on held-out texts"
        half = self.subject.source.shape_to_compress.half_bytes
        size = None if self.bounds.max_bytes is None else min(4.0, self.bounds.max_bytes / half)
        return Recipe(
            name=options.name,
            description=described,
            model=self.subject.model,
            runtime=options.scoring.runtime,
            seed=options.scoring.seed,
            steps=self.maker.steps(chosen)[len(self.subject.exact) :],
            calibration=Calibration(
                texts=options.scoring.texts, count=options.scoring.count, max_tokens=options.scoring.max_tokens
            ),
            evaluate=Evaluate(tasks=resolved(options.tasks or ("mini",), Path.cwd()), data=options.data),
            gates=Gates(retained=kept, size_ratio=size, speedup=self.bounds.min_speedup),
        )


def _drawn(problem: Problem, generator: np.random.Generator) -> dict[str, str]:
    """Draw an assignment that leaves no layers as they are and no blocks out; blocks may be narrower."""
    chosen: dict[str, str] = {}
    for depends in (False, True):  # what other groups depend on is drawn first
        offered: dict[str, list[str]] = {}
        for item in problem.items:
            if (item.given is not None) != depends or (item.given is not None and chosen[item.given[0]] not in item.given[1]):
                continue
            if item.choice != (DROPPED if item.group.endswith(f".{WHOLE}") else AS_STORED):
                offered.setdefault(item.group, []).append(item.choice)
        chosen |= {group: str(generator.choice(choices)) for group, choices in offered.items()}
    return chosen


def write_found(found: Found, to: Path) -> None:
    """Write a recipe file, and next to it the record of why it is this recipe: `NAME.search.json`."""
    plain = found.recipe.model_dump(mode="json", exclude_defaults=True)
    plain["steps"] = [{"method": step.method} | step.model_dump(mode="json", exclude_unset=True) for step in found.recipe.steps]
    head = [
        "# Found by `compress search`. It is a recipe like any other: read it, run it, change it.",
        f"# Why these choices: {to.stem}.search.json",
    ]
    yaml = YAML()
    yaml.width = 120
    with replacing(to) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("\n".join(head) + "\n")
        yaml.dump(plain, file)
    write_text_atomic(to.with_name(f"{to.stem}.search.json"), json.dumps(found.why, indent=1) + "\n")
