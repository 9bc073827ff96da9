"""The rooms' order, and what must not be imported where answers should be quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from compress.methods import METHODS

ROOT = Path(__file__).parents[1] / "compress"
# From left to right; a room imports itself and rooms to its right.
LEVELS = [
    ["cli"],
    ["search"],
    ["pipeline", "serve"],
    ["reports"],
    ["methods", "export", "scale"],
    ["measure", "calibration"],
    ["runtimes"],
    ["models"],
    ["layers", "data"],
    ["common"],
]
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0]


def imports_of(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("compress."):
            found.append(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".")[1] for alias in node.names if alias.name.startswith("compress.")]
    return found


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    upward = [other for other in imports_of(path) if other != room and LEVEL[other] <= LEVEL[room]]
    assert upward == []


def test_methods_do_not_import_each_other() -> None:
    for path in (ROOT / "methods").rglob("*.py"):
        if path.name in ("__init__.py", "base.py"):  # a base is no method
            continue
        names = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module}
        assert not names & {place.partition(":")[0] for place in METHODS.values()}


LIGHT = """
import sys
from compress.common.errors import UserError
from compress.pipeline.recipe_file import read_recipe, schema
from compress.models.source import find_shape
from compress.pipeline.plan import describe, make_plan
import compress.measure.record, compress.models.embedder, compress.models.text.tokens, compress.models.files.variant, compress.layers.scheme
import pathlib
describe(make_plan(read_recipe({recipe!r}), find_shape("nvidia/NV-Embed-v2"), pathlib.Path("results")))
schema()
heavy = {{"torch", "transformers", "mteb", "datasets", "sklearn", "sentence_transformers"}} & set(sys.modules)
assert not heavy, heavy
"""


def test_reading_and_planning_import_nothing_heavy() -> None:
    recipe = str(ROOT.parent / "recipes" / "int8.yaml")
    subprocess.run([sys.executable, "-c", LIGHT.format(recipe=recipe)], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "TYPO"], ["plan", "TYPO"], ["schema"], ["plan", "RECIPE"]])
def test_light_commands_answer_without_torch(tmp_path: Path, arguments: list[str]) -> None:
    """Half a second is the aim; what takes longer is not imported."""
    (tmp_path / "typo.yaml").write_text("stepps: []")
    places = {"TYPO": str(tmp_path / "typo.yaml"), "RECIPE": str(ROOT.parent / "recipes" / "int8.yaml")}
    command = [sys.executable, "-X", "importtime", "-m", "compress.cli", *(places.get(word, word) for word in arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == (2 if "TYPO" in arguments else 0)
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "compress.common.errors" in imported
    assert not imported & {"torch", "transformers", "mteb"}
