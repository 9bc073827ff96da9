"""Recipes: what is accepted, and how everything else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.common.errors import UserError
from compress.methods import METHODS, method_class
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import parse_recipe, read_recipe, schema

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_project_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert recipe.description


def test_defaults_are_filled_in_and_survive_a_round_trip() -> None:
    recipe = parse_recipe({"steps": [{"method": "rtn"}]})
    filled = {"method": "rtn", "bits": 8, "activations": "dynamic_per_token", "skip": ()}
    assert filled.items() <= recipe.steps[0].model_dump().items()
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps: []", "r.yaml, line 1: stepps: unknown key 'stepps'; did you mean 'steps'?"),
        ("seed: 1\nmeasure:\n  rouns: 3", "r.yaml, line 3: measure.rouns: unknown key 'rouns'; did you mean 'rounds'?"),
        ("steps:\n  - method: rtm", "r.yaml, line 2: steps.0.method: unknown method 'rtm'; did you mean 'rtn'?"),
        ("steps:\n  - method: [1]", "line 2: steps.0.method: unknown method"),
        ("steps:\n  - rtn", "line 2: steps.0: a step is a mapping with a 'method'"),
        ("steps: 3", "line 1: steps: must be a list of steps"),
        (
            "steps:\n  - method: rtn\n  - method: rtn\n    bitts: 8",
            "line 4: steps.1.bitts: unknown key 'bitts'; did you mean 'bits'?",
        ),
        ("steps:\n  - method: rtn\n    bits: 7", "line 3: steps.0.bits: 7 is not allowed here; known: 2, 3, 4, 5, 6, 8"),
        (
            "steps:\n  - method: rtn\n    activations: dynamic_per_tokens",
            "line 3: steps.0.activations: 'dynamic_per_tokens' is not allowed here; did you mean 'dynamic_per_token'?",
        ),
        ("steps:\n  - method: rtn\n    skip: '*.x'", "line 3: steps.0.skip: input should be a list, got '*.x'"),
        ("measure:\n  count: many", "line 2: measure.count: input should be a valid integer, got 'many'"),
        ("measure:\n  count: '256'", "line 2: measure.count: input should be a valid integer, got '256'"),
        ("measure:\n  rounds: 0", "line 2: measure.rounds: input should be greater than or equal to 1, got 0"),
        ("gates:\n  retained: true", "line 2: gates.retained: input should be a valid number, got True"),
        ("export: [varint]", "line 1: export.0: 'varint' is not allowed here; did you mean 'variant'?"),
        ("runtime: onyx", "line 1: runtime: 'onyx' is not allowed here; known: auto, gptq, numpy, onnxruntime, openvino, torch"),
        ("model:", "line 1: model: input should be a valid string, got None"),
        ("evaluate: 3", "line 1: evaluate: input should be a mapping"),
        ("a: [1", "line 1: not YAML: expected ',' or ']'"),
        ("seed: 1\nseed: 2", "line 2: not YAML: found duplicate key"),
        ("a: \x00", "not YAML"),
        ("- 1", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
    ],
)
def test_faults_are_named_with_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, text))
    assert message in caught.value.message
    assert str(tmp_path / "r.yaml") in caught.value.message


def test_all_faults_are_named_at_once_in_order(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, "seed: x\nsteps:\n  - method: rtn\n    bits: 7\nmodle: y"))
    lines = [caught.value.message, *caught.value.hint.splitlines()]
    assert [line.split(": ")[0].rsplit(" ", 1)[1] for line in lines] == ["1", "4", "5"]


def test_a_missing_recipe_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "seed: 0")
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_recipe(tmp_path / "rr.yaml")
    assert "r.yaml" in caught.value.hint


def test_the_schema_describes_every_key_of_every_method() -> None:
    described = json.loads(json.dumps(schema()))
    assert set(described["properties"]) == set(Recipe.model_fields)
    taken = [item["$ref"].split("/")[-1] for item in described["properties"]["steps"]["items"]["oneOf"]]
    assert taken == [*METHODS, "rounds"]
    in_rounds = described["$defs"]["rounds"]["properties"]["steps"]["items"]["oneOf"]
    assert [item["$ref"].split("/")[-1] for item in in_rounds] == ["depth", "width", "distill"]
    for name in METHODS:
        definition = described["$defs"][name]
        assert set(definition["properties"]) == set(method_class(name).model_fields)
        assert definition["additionalProperties"] is False
        undocumented = [key for key, value in definition["properties"].items() if key != "method" and "description" not in value]
        assert undocumented == []


def test_the_schema_beside_the_recipes_is_current() -> None:
    assert json.loads((RECIPES[0].parent / "schema.json").read_text()) == schema()
