"""Reads sweep files: recipes, models and values. What cannot be run is named with its place before anything runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, Field, ValidationError

from compress.common.errors import UserError
from compress.common.yaml_files import Fault, check_there, fault_at, faults_of, line_at, plain, read_yaml, refusal, refuse
from compress.models.random_weights import PREFIX as RANDOM
from compress.pipeline.recipe import LONGEST_NAME, Recipe, Section
from compress.pipeline.recipe_file import parse_recipe, read_recipe

S = TypeVar("S", bound=BaseModel)
MOST_RUNS = 1000
"""Runs of a sweep's first round. More of them were hardly meant."""
Best = Literal["kept", "cosine", "size", "speed"]
NEEDS: dict[str, str] = {"cosine": "fidelity", "speed": "speed"}
"""What of `measure.what` a figure needs."""
OWN_PLACE = {
    "name": "runs are named after their values",
    "description": "it says the values",
    "take_when": "it decides nothing",
    "not_when": "it decides nothing",
    "model": "`models` lists them",
}
"""Keys of a recipe that are not varied, and why."""


class Range(Section):
    """A range that values are drawn from, both ends included. Two whole numbers are a range of whole numbers."""

    low: int | float
    """Least value."""
    high: int | float
    """Largest value."""
    step: int | float | None = Field(None, gt=0)
    """Distance of the values from one to the next, counted from `low`. Left out, whole numbers go by 1 and others are any."""
    log: bool = False
    """Whether values are drawn evenly by their logarithm."""

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        return all(isinstance(end, int) for end in (self.low, self.high, self.step or 1))

    def listed(self) -> list[int | float]:
        """Return all values, if they can be counted and are no more than a list may have; else both ends."""
        step = self.step or (1 if self.whole else None)
        if step is None or (self.high - self.low) / step >= MOST_RUNS:
            return [self.low, self.high]
        return [self.low + number * step for number in range(round((self.high - self.low) / step) + 1)]


class Round(Section):
    """A round of a sweep: the tasks that runs are scored on, and how many of them go on."""

    tasks: tuple[str, ...] | None = None
    """Task names, or `mini`, as `evaluate.tasks` of a recipe. Left out, each recipe's own."""
    keep: float = Field(0.5, gt=0, le=1)
    """Share of each model's runs that go on to the next round, the best first; rounded up."""


class Sweep(Section):
    """What a sweep file may say."""

    description: str = ""
    """What the sweep is for, in one line."""
    recipes: tuple[str, ...] = Field(min_length=1)
    """Recipe files, each the base of runs. Paths are relative to the sweep file."""
    models: tuple[str, ...] = ()
    """Models that every recipe is run on. Left out, each recipe's own."""
    values: dict[str, Any] = Field({})
    """Values of the recipes' keys, written with dots and numbers from 0 (`steps.0.bits`): a list of values, every one of which is
    run with every one of the other keys, or a range, from which Optuna draws."""
    rounds: tuple[Any, ...] = ()
    """Rounds, the cheapest first; the best runs of each go on to the next. Left out, one round with the recipes' own tasks."""
    best: Best = "kept"
    """What is asked of the best run: the most `kept` of the baseline's mean score, the highest mean `cosine` to the baseline's
    vectors, the least `size` or the most `speed`. Runs that miss a gate of their recipe come after all that miss none."""
    trials: int = Field(20, ge=1, le=MOST_RUNS)
    """Number of values that are drawn for each recipe on each model, if there is a range."""
    batch: int = Field(4, ge=1, le=MOST_RUNS)
    """Number of values that are drawn, from ranges, before their results are looked at; so many runs at most work at a time."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of what is drawn. The seed of the runs is the recipe's."""


@dataclass(frozen=True)
class Point:
    """A recipe with its values, on a model."""

    recipe: Recipe
    """Named after the values; its model is the one that it runs on."""
    label: str
    """Recipe and values for people: `int4-rtn bits=3`."""


@dataclass(frozen=True)
class Space:
    """A recipe on a model, and the values that it is run with."""

    base: Recipe
    raw: Mapping[str, Any]
    """The recipe's keys as far as they are not left at their defaults."""
    lists: Mapping[str, tuple[Any, ...]]
    ranges: Mapping[str, Range]
    place: str
    """The sweep file, for errors."""

    def least(self) -> dict[str, Any]:
        """Return the first value of each list and the least of each range."""
        return {key: values[0] for key, values in self.lists.items()} | {key: one.low for key, one in self.ranges.items()}

    def grid(self) -> list[Point]:
        """Return a point for every combination of the values of the lists; the last key changes fastest."""
        return [self.point(dict(zip(self.lists, chosen, strict=True))) for chosen in product(*self.lists.values())]

    def point(self, chosen: Mapping[str, Any]) -> Point:
        """Return the point of these values, by key.

        Raises:
            UserError: they make no valid recipe.
        """
        recipe = parse_recipe(_with(self.raw, chosen), self.place)
        said, label = self._short(chosen), self.label(chosen)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([self.base.name, *(part for pair in said for part in pair)]))
        changed = {"name": name[:LONGEST_NAME] if said else self.base.name, "description": label, "model": self.base.model}
        return Point(recipe.model_copy(update={**changed, "take_when": "", "not_when": ""}), label)

    def label(self, chosen: Mapping[str, Any]) -> str:
        """Return what the recipe with these values is called."""
        return " ".join([self.base.name, *(f"{name}={value}" for name, value in self._short(chosen))])

    def _short(self, chosen: Mapping[str, Any]) -> list[tuple[str, str]]:
        return [(name, self._said(key, chosen[key])) for key, name in _short(chosen).items()]

    def _said(self, key: str, value: Any) -> str:
        """Return a value for people; a list or mapping by its number among the values of its key, from 1."""
        if isinstance(value, (tuple, dict)):
            return str(self.lists[key].index(value) + 1)
        return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Plan:
    """A sweep that can be run."""

    sweep: Sweep
    rounds: tuple[Round, ...]
    spaces: tuple[Space, ...]
    """Model by model, and within a model recipe by recipe."""

    @property
    def drawn(self) -> bool:
        """Whether values are drawn from ranges."""
        return any(space.ranges for space in self.spaces)

    @property
    def runs(self) -> int:
        """Number of runs of the first round."""
        each = [self.sweep.trials if self.drawn else prod(map(len, space.lists.values())) for space in self.spaces]
        return sum(each)


def read_sweep(path: Path | str) -> Plan:
    """Read a sweep file and the recipes that it names, and check every combination of its values.

    Raises:
        UserError: a file is missing or is not valid, or values make no valid recipe; names file, line and key.
    """
    path = Path(path)
    check_there(path, "sweep")
    data = read_yaml(path, "a sweep", "see docs/sweeps.md")
    content = plain(data)
    faults: list[Fault] = []
    rounds = _rounds(content.get("rounds", ()), data, faults)
    lists, ranges = _values(content.get("values", {}), data, faults)
    try:
        sweep = Sweep.model_validate(content)
    except ValidationError as error:
        raise refusal(faults + faults_of(error, Sweep, data, ()), str(path)) from error
    refuse(faults, str(path))
    bases = [_base(path, data, number, name) for number, name in enumerate(sweep.recipes)]
    spaces = [
        Space(base.model_copy(update={"model": model or base.model}), _raw(base), lists, ranges, str(path))
        for model in sweep.models or (None,)
        for base in bases
    ]
    plan = Plan(sweep, rounds, tuple(spaces))
    if plan.runs > MOST_RUNS:
        raise UserError(f"{path}: {plan.runs:,} runs, at most {MOST_RUNS:,} are taken", "fewer values, or a range and `trials`")
    _check_repeats(plan, data, path)
    _check_points(plan, data, path)
    return plan


def _rounds(written: Any, data: Any, faults: list[Fault]) -> tuple[Round, ...]:
    """Return the rounds, and note what is wrong with them."""
    if not isinstance(written, tuple):
        return ()  # the sweep's own check says that it is no list
    rounds: list[Round] = []
    for number, one in enumerate(written):
        made = _section(one, Round, data, ("rounds", number), faults)
        rounds += [] if made is None else [made]
    last = len(written) - 1
    if written and isinstance(written[last], dict) and "keep" in written[last]:
        faults.append(fault_at(data, ("rounds", last, "keep"), "has no effect in the last round, after which none goes on"))
    return tuple(rounds) or (Round(),)


def _values(written: Any, data: Any, faults: list[Fault]) -> tuple[dict[str, tuple[Any, ...]], dict[str, Range]]:
    """Return the lists and the ranges of values by key, and note what is wrong with them."""
    lists: dict[str, tuple[Any, ...]] = {}
    ranges: dict[str, Range] = {}
    for key, value in written.items() if isinstance(written, dict) else ():
        place = ("values", key)
        outer = next((other for other in written if key.startswith(f"{other}.")), None)
        if key in OWN_PLACE:
            faults.append(fault_at(data, place, f"is not varied: {OWN_PLACE[key]}"))
        elif outer is not None:
            faults.append(fault_at(data, place, f"is inside of {outer}, which is varied too"))
        elif isinstance(value, tuple) and value:
            again = [number for number, one in enumerate(value) if one in value[:number]]
            faults += [fault_at(data, (*place, number), f"{value[number]!r} is given twice") for number in again]
            lists[key] = value
        elif isinstance(value, dict) and value:
            made = _section(value, Range, data, place, faults)
            if made is not None:
                faults += [fault_at(data, place, fault) for fault in _faults_of_range(made)]
                ranges[key] = made
        else:
            faults.append(fault_at(data, place, f"a list of values, or a range such as {{low: 1, high: 8}}, got {value!r}"))
    return lists, ranges


def _section(written: Any, kind: type[S], data: Any, place: tuple[str | int, ...], faults: list[Fault]) -> S | None:
    """Return a section of the file; None, and its faults noted, where it is not valid."""
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        faults += faults_of(error, kind, data, place)
        return None


def _faults_of_range(given: Range) -> Iterator[str]:
    """Say what is wrong with a range whose keys are valid."""
    if given.low >= given.high:
        yield f"low must be less than high, got {given.low} and {given.high}"
    if given.log and given.step is not None:
        yield "takes a step or log, not both"
    if given.log and given.low <= 0:
        yield f"log needs a low above 0, got {given.low}"
    steps = (given.high - given.low) / given.step if given.step else 0.0
    if abs(steps - round(steps)) > 1e-9 * max(1.0, steps):
        yield f"high is no whole number of steps of {given.step} above low"


def _base(path: Path, data: Any, number: int, name: str) -> Recipe:
    """Read a recipe that a sweep file names.

    Raises:
        UserError: see `read_recipe`; or the file is named twice.
    """
    line = line_at(data, ("recipes", number))
    if name in list(data["recipes"])[:number]:
        raise UserError(f"{path}, line {line}: recipes.{number}: {name!r} is given twice")
    try:
        return read_recipe(path.parent / name)
    except UserError as error:
        raise UserError(f"{path}, line {line}: recipes.{number}: {error.message}", error.hint) from error


def _raw(recipe: Recipe) -> dict[str, Any]:
    """Return the keys of a recipe that are not left at their defaults."""
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    raw["steps"] = [{"method": step.method} | step.model_dump(mode="json", exclude_unset=True) for step in recipe.steps]
    return raw


def _with(raw: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's keys with other values.

    Raises:
        UserError: a key leads nowhere.
    """
    changed: dict[str, Any] = deepcopy(dict(raw))
    for key, value in chosen.items():
        *way, last = key.split(".")
        inside: Any = changed
        for number, part in enumerate(way):
            at = ".".join(way[: number + 1])
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else inside[_number(part, inside, at)]
            if not isinstance(inside, (dict, list)):
                raise UserError(f"{key}: {at} is {inside!r}, which has no keys")
        inside[_number(last, inside, key) if isinstance(inside, list) else last] = deepcopy(value)
    return changed


def _number(part: str, inside: Sequence[Any], key: str) -> int:
    """Return the place in a list that a part of a key names.

    Raises:
        UserError: the list has none.
    """
    if not part.isdecimal() or int(part) >= len(inside):
        held = f"the list has {len(inside)}, numbered from 0" if inside else "the list is empty"
        raise UserError(f"{key}: {part!r} is no place in the list: {held}")
    return int(part)


def _short(keys: Mapping[str, Any]) -> dict[str, str]:
    """Return the shortest end of each key that no other key has: `bits`, or `0.bits` and `1.bits`."""
    shortened = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        counts = Counter(end for end in ends for other in keys if f".{other}".endswith(f".{end}"))
        shortened[key] = next((end for end in ends if counts[end] == 1), key)
    return shortened


def _check_points(plan: Plan, data: Any, path: Path) -> None:
    """See that values make valid recipes, which measure what `best` looks at.

    Raises:
        UserError: one is not; names the value's line where the value alone is to blame.
    """
    for space in plan.spaces:
        for values in _samples(space):
            try:
                point = space.point(values)
            except UserError as error:
                raise _blamed(space, values, error, data, path) from error
            _check_best(plan, point, data, path)


def _samples(space: Space) -> Iterator[dict[str, Any]]:
    """Yield values to check: every combination of the lists with the ends of the ranges, and every value of each range."""
    for ends in ("low", "high") if space.ranges else ("low",):
        at = {key: getattr(one, ends) for key, one in space.ranges.items()}
        for chosen in product(*space.lists.values()):
            yield dict(zip(space.lists, chosen, strict=True)) | at
    for key, one in space.ranges.items():
        yield from (space.least() | {key: value} for value in one.listed())


def _blamed(space: Space, values: Mapping[str, Any], error: UserError, data: Any, path: Path) -> UserError:
    """Return the error about values with the place of the one that is invalid even alone; if there is none, with all of them."""
    whole = error.message.removeprefix(f"{path}: ")
    for key, value in values.items():
        try:
            space.point({key: value})
        except UserError as alone:
            way: tuple[str | int, ...] = ("values", key, *([space.lists[key].index(value)] if key in space.lists else []))
            said = f"{path}, line {line_at(data, way)}: values.{key}: with {_shown(value)} in {space.base.name}: "
            return UserError(said + alone.message.removeprefix(f"{path}: "), alone.hint)
    said = ", ".join(f"{key}: {_shown(value)}" for key, value in values.items())
    return UserError(f"{path}, line {line_at(data, ('values',))}: values: {said} do not go together in {space.base.name}: {whole}")


def _shown(value: Any) -> str:
    """Return a value much as it is in the file: a list in brackets."""
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, tuple) else repr(value)


def _check_repeats(plan: Plan, data: Any, path: Path) -> None:
    """See that models and recipes have names of their own, and that no key of `values` is one that the rounds decide.

    Raises:
        UserError: one is.
    """
    models = plan.sweep.models
    for number, model in enumerate(models):
        if model in models[:number]:
            line = line_at(data, ("models", number))
            raise UserError(f"{path}, line {line}: models.{number}: {model!r} is given twice")
    names = [space.base.name for space in plan.spaces[: len(plan.sweep.recipes)]]
    for number, name in enumerate(names):
        if name in names[:number]:
            line = line_at(data, ("recipes", number))
            raise UserError(f"{path}, line {line}: recipes.{number}: its name, {name!r}, is that of an earlier one", "rename it")
    key = "evaluate.tasks"
    if key in plan.sweep.values and any(one.tasks is not None for one in plan.rounds):
        raise UserError(f"{path}, line {line_at(data, ('values', key))}: values.{key}: the rounds name the tasks", "leave one out")


def _check_best(plan: Plan, point: Point, data: Any, path: Path) -> None:
    """See that every round of a run measures what `best` looks at.

    Raises:
        UserError: it does not.
    """
    best, recipe = plan.sweep.best, point.recipe
    lacking = None
    if best in ("kept", "cosine") and recipe.model.startswith(RANDOM):
        lacking = f"{recipe.model} has random weights, so that only size and speed mean anything"
    elif best == "kept" and not all(recipe.evaluate.tasks if one.tasks is None else one.tasks for one in plan.rounds):
        lacking = "a round has no tasks"
    elif best in NEEDS and NEEDS[best] not in recipe.measure.what:
        lacking = f"measure.what has no {NEEDS[best]}"
    if lacking is not None:
        line = line_at(data, ("best",)) or 1
        others = ", ".join(name for name in get_args(Best) if name != best)
        raise UserError(f"{path}, line {line}: best: {best} is not measured for {point.label}: {lacking}", f"or choose {others}")
