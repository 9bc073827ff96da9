"""Reads recipe files. A faulty one is refused with file, line, key and the nearest valid name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.common.errors import nearest
from compress.common.yaml_files import Fault, check_there, fault_at, faults_of, plain, read_yaml, refuse
from compress.measure.accuracy.own_task import resolved
from compress.methods import is_method, method_class, method_names
from compress.methods.base import Method
from compress.pipeline.recipe import Recipe
from compress.pipeline.rounds import ROUNDS, Rounds, fault_of

Place = tuple[str | int, ...]
MOST_FAULTS = 50
"""Faults that are named; those of further steps are found once these are mended."""


def read_recipe(path: Path | str) -> Recipe:
    """Read a recipe file. Folders of tasks (`./my-task`) are those next to the file, wherever the process runs.

    Raises:
        UserError: the file is missing, is not YAML, or is not a valid recipe; every fault is named with its line.
    """
    path = Path(path)
    check_there(path, "recipe")
    data = read_yaml(path, "a recipe", "see recipes/int8.yaml")
    recipe = parse_recipe(data, str(path))
    tasks = resolved(recipe.evaluate.tasks, path.parent)
    if tasks != recipe.evaluate.tasks:
        recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"tasks": tasks})})
    return recipe if "name" in recipe.model_fields_set else recipe.model_copy(update={"name": path.stem})


def parse_recipe(data: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """Check the content of a recipe; `place` names it in errors.

    Raises:
        UserError: naming every fault.
    """
    content = plain(data)
    faults: list[Fault] = []
    steps: list[Method | Rounds] = []
    raw_steps = content.pop("steps", ())
    if not isinstance(raw_steps, tuple):
        faults.append(fault_at(data, ("steps",), "must be a list of steps, each with a 'method'"))
        raw_steps = ()
    for index, raw in enumerate(raw_steps):
        if len(faults) >= MOST_FAULTS:
            break
        where = ("steps", index)
        step = (_parse_rounds if _is_group(raw) else _parse_step)(raw, data, where, faults)
        if step is not None:
            steps.append(step)
    try:
        recipe = Recipe.model_validate({**content, "steps": tuple(steps)})
    except ValidationError as error:
        faults += faults_of(error, Recipe, data, ())
    refuse(faults, place)
    return recipe


def _is_group(raw: Any) -> bool:
    return isinstance(raw, dict) and raw.get("method", ROUNDS if ROUNDS in raw else None) == ROUNDS


def _parse_rounds(raw: Any, data: Any, where: Place, faults: list[Fault]) -> Rounds | None:
    inner, known = raw.get("steps"), len(faults)
    if not isinstance(inner, tuple):
        faults.append(fault_at(data, (*where, "steps"), "must be a list of steps: what is pruned by the end, and last distill"))
        return None
    steps: list[Method] = []
    for number, one in enumerate(inner):
        place = (*where, "steps", number)
        if _is_group(one):
            faults.append(fault_at(data, place, "rounds in rounds are not taken; put the steps of both into one group"))
            continue
        step = _parse_step(one, data, place, faults)
        steps += [] if step is None else [step]
    if len(faults) > known:
        return None
    rounds = raw.get(ROUNDS)
    fault = fault_of(rounds, steps) if type(rounds) is int else None
    if fault is not None:
        faults.append(fault_at(data, (*where, *fault[0]), fault[1]))
        return None
    try:
        return Rounds.model_validate({**raw, "steps": tuple(steps)})
    except ValidationError as error:
        faults += faults_of(error, Rounds, data, where)
        return None


def _parse_step(raw: Any, data: Any, where: Place, faults: list[Fault]) -> Method | None:
    if not isinstance(raw, dict) or "method" not in raw:
        faults.append(fault_at(data, where, f"a step is a mapping with a 'method'; {nearest('', method_names())}"))
        return None
    name = raw["method"]
    if not isinstance(name, str) or not is_method(name):
        faults.append(fault_at(data, (*where, "method"), f"unknown method {name!r}; {nearest(str(name), method_names())}"))
        return None
    kind = method_class(name)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults += faults_of(error, kind, data, where)
        return None


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes with the keys of every method, so that editors complete and check them."""
    described = Recipe.model_json_schema()
    definitions = described.setdefault("$defs", {})
    definitions.pop("Method", None)
    group = definitions.pop(Rounds.__name__)
    references, spread = [], []
    for name in method_names():
        definition = method_class(name).model_json_schema()
        definitions |= definition.pop("$defs", {})
        definition["required"] = ["method"]  # it has a default, but only for Python callers
        definitions[name] = definition
        references.append({"$ref": f"#/$defs/{name}"})
        spread += references[-1:] if method_class(name).spreads else []
    group["properties"]["steps"]["items"] = {"oneOf": spread}
    definitions[ROUNDS] = group
    described["properties"]["steps"]["items"] = {"oneOf": [*references, {"$ref": f"#/$defs/{ROUNDS}"}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
