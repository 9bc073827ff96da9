"""What README and docs/ tell a reader to type is accepted: commands, recipes, Python, and the example that is run."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
from tests_support import refusal

from compress.pipeline.recipe_file import parse_recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> list[tuple[str, bool]]:
    """Return each `compress ...` of the pages and whether it is to be typed as it stands, rather than a mention of an option."""
    found = set()
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
        found |= {(line, True) for line in re.findall(r"^    (compress .*)$", text, re.M)}
        found |= {(" ".join(code.split()), False) for code in re.findall(r"`(compress [a-z][^`]*)`", text)}
        found |= {(command, False) for command in re.findall(r"<!-- by: (compress [^>]*?) -->", text)}
    return sorted(found)


@pytest.mark.parametrize(("line", "whole"), commands())
def test_commands_parse(line: str, whole: bool) -> None:
    refused = refusal(line)
    if whole or type(refused).__name__ != "MissingParameter":  # a mention may leave arguments out
        assert refused is None


def test_the_readme_names_its_commands() -> None:
    typed = {line.split()[1] for line, whole in commands() if whole}
    assert typed >= {"plan", "run", "compare", "evaluate", "export"}


def fenced(language: str) -> list[tuple[str, str]]:
    """Return the pages' blocks of a language, with the page's name."""
    blocks = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks += [(page.name, block) for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)]
    return blocks


def test_recipes_in_the_pages_are_recipes() -> None:
    from ruamel.yaml import YAML

    blocks = [(name, block) for name, block in fenced("yaml") if "steps:" in block]
    assert {name for name, _ in blocks} >= {"README.md", "recipes.md"}
    for name, block in blocks:
        assert parse_recipe(YAML(typ="safe").load(block), name).steps


def test_python_in_the_pages_is_python() -> None:
    import compress

    blocks = fenced("python")
    assert "README.md" in {name for name, _ in blocks}
    for _, block in blocks:
        used = {
            node.attr
            for node in ast.walk(ast.parse(block))
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "compress"
        }
        assert used <= set(compress.__all__)


def test_recipes_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"recipes/([\w-]+\.yaml)", page.read_text(encoding="utf-8"))}
    assert named - {"RECIPE.yaml"} <= {path.name for path in (ROOT / "recipes").iterdir()}
    assert "int8.yaml" in named


def test_benchmarks_that_pages_name_exist() -> None:
    named = {name for page in PAGES for name in re.findall(r"benchmarks/(\w+\.py)", page.read_text(encoding="utf-8"))}
    assert named <= {path.name for path in (ROOT / "benchmarks").iterdir()}
    assert "throughput.py" in named


def test_the_example_compresses_and_keeps_the_vectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(ROOT / "examples" / "shrink_nano.py"))
    assert example["main"](tmp_path) > 0.99
    assert re.search(r"size: 23\.0 MB -> 1\d\.\d MB", capsys.readouterr().out)
