"""The notebook of `examples/` is whole and holds its outputs, what it tells a reader to type is accepted, and it runs from top to bottom."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests_support import refusal

import compress
from compress.data.texts import suite_texts
from compress.runtimes.exported import open_export

EXAMPLES = Path(__file__).parents[1] / "examples"
FILE = EXAMPLES / "tutorial.ipynb"
NOTEBOOK: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
CELLS: list[dict[str, Any]] = NOTEBOOK["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PROSE = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
OF_A_MACHINE = r"/(home|root|tmp|work|Users|usr|opt|var|mnt|srv)/|[A-Z]:\\\\|site-packages|\.pyenv|file://|localhost|127\.0\.0\.1"
SAYS = r"^!compress (?!.* --to )|\b(print|print_record|summary|SVG)\(|say=print\)"
"""What gives a cell an output: a command that does not write a file, a call that prints."""
NEEDED = {
    "stream": {"output_type", "name", "text"},
    "display_data": {"output_type", "data", "metadata"},
    "execute_result": {"output_type", "data", "metadata", "execution_count"},
}
"""The keys of each kind of output, by nbformat 4."""


def parts(cell: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield a cell's commands (True) and the Python between them (False), in order; a backslash continues a command."""
    python: list[str] = []
    lines = iter("".join(cell["source"]).splitlines())
    for line in lines:
        assert not line.startswith("%"), "a magic, which only IPython knows"
        if not line.startswith("!"):
            python.append(line)
            continue
        while line.endswith("\\"):
            line = f"{line[:-1].rstrip()} {next(lines).strip()}"
        yield from [(False, "\n".join(python))] * any(python)
        python = []
        yield True, line[1:]
    yield from [(False, "\n".join(python))] * any(python)


def commands() -> list[tuple[str, bool]]:
    """Return every `compress ...`, and whether it is run or typed as it stands rather than mentioned; names in braces stay."""
    run = [text for cell in CODE for is_command, text in parts(cell) if is_command]
    typed, mentioned = re.findall(r"^    (compress .*)$", PROSE, re.M), re.findall(r"`(compress [a-z][^`]*)`", PROSE)
    return [*((line, True) for line in [*run, *typed]), *((" ".join(line.split()), False) for line in mentioned)]


def test_the_format_is_nbformat_4_for_any_python_3() -> None:
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert NOTEBOOK.keys() == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert NOTEBOOK["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in ids)
    for cell in CELLS:
        both = {"cell_type", "id", "metadata", "source"}
        assert cell.keys() == (both | {"execution_count", "outputs"} if cell["cell_type"] == "code" else both)
        assert cell["metadata"] in ({}, {"tags": ["parameters"]})  # no moments of execution
        assert cell["source"]


def test_it_was_run_in_order_without_an_error_or_a_warning() -> None:
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for output in cell["outputs"]:
            assert output.keys() == NEEDED[output["output_type"]]  # which has no errors
            assert output.get("name", "stdout") == "stdout"
        text = json.dumps(cell["outputs"])
        assert not re.search(r"[Ww]arning|Traceback|error: |\\u001b", text), text
        says = re.search(SAYS, "".join(cell["source"]), re.M)
        assert bool(cell["outputs"]) == bool(says), cell["id"]
    assert sum("image/svg+xml" in output.get("data", {}) for cell in CODE for output in cell["outputs"]) == 2


def test_it_is_small_and_names_no_place_of_a_machine() -> None:
    assert FILE.stat().st_size < 300_000
    found = re.search(OF_A_MACHINE, FILE.read_text(encoding="utf-8"))
    assert found is None, found


def test_its_python_is_python() -> None:
    for cell in CODE:
        for is_command, text in parts(cell):
            if not is_command:
                ast.parse(text)
                assert not re.search(r"^\s*[!%]", text, re.M)


def test_its_commands_are_accepted() -> None:
    found = commands()
    assert {line.split()[1] for line, whole in found if whole} == {"plan", "run", "compare", "search"}
    for line, whole in found:
        assert line.startswith("compress ")
        refused = refusal(line)
        if whole or type(refused).__name__ != "MissingParameter":  # a mention may leave arguments out
            assert refused is None, line


def test_its_recipes_and_links_are_there() -> None:
    everything = "\n".join(text for cell in CODE for _, text in parts(cell)) + PROSE
    named = set(re.findall(r"\.\./recipes/[\w-]+\.yaml", everything))
    assert len(named) > 1
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", PROSE, re.M)}
    links = set(re.findall(r"\]\(([^)]+)\)", PROSE))
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    for target in named | {link for link in links if not link.startswith("#")}:
        assert (EXAMPLES / target).is_file(), target


class Execution:
    """Runs a notebook's cells in this process, and its commands in a shell, with names in braces replaced as IPython does."""

    def __init__(self, overrides: dict[str, Any]) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.overrides = overrides

    def run(self, cell: dict[str, Any]) -> None:
        for is_command, text in parts(cell):
            if is_command:
                self.command(text)
            else:
                exec(compile(text, cell["id"], "exec"), self.names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert self.overrides.keys() <= self.names.keys()
            self.names |= self.overrides

    def command(self, line: str) -> None:
        filled = re.sub(r"\{([^}]+)\}", lambda found: str(eval(found[1], self.names)), line)
        done = subprocess.run(filled, shell=True, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        print(done.stdout)


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures that are shown, in place of IPython, which need not be installed."""
    shown: list[str] = []
    display = ModuleType("IPython.display")
    display.SVG = lambda filename: shown.append(Path(filename).read_text())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(
    tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(EXAMPLES)
    monkeypatch.setenv("PATH", os.environ["PATH"])  # the notebook changes it
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    execution = Execution({"RUNS": str(tmp_path), "TASKS": "MiniSTS"})
    for cell in CODE:
        execution.run(cell)
    said, names = capsys.readouterr().out, execution.names

    int8, bounded = names["int8"], names["bounded"]
    assert [str(task.task) for task in int8.tasks] == ["MiniSTS"]
    assert int8.retained > 0.99
    assert f"int8: keeps {int8.retained:.2%} of the mean score" in said
    assert bounded.row("variant").size_bytes <= 10e6 < int8.row("variant").size_bytes
    assert [(gate.name, gate.kept) for gate in bounded.gates] == [("size_ratio", True)]
    assert bounded.retained > 0.95
    assert "NV-Embed-v2: 7,851.0 M parameters" in said  # the plan of a model that is not here

    first, second = pictures
    of_recipes = {"int8", "int4-onnx", "depth-25"}
    assert {name for name in [*of_recipes, "bounded"] if f"<title>{name}: " in first} == of_recipes
    assert all(f"<title>{name}: " in second for name in [*of_recipes, "bounded"])

    texts = suite_texts()[:8]
    made = compress.load(tmp_path / bounded.run).encode(texts)
    np.testing.assert_allclose(made, open_export(names["exported"]).encode(texts), atol=1e-4)
    notices = [[names["notices"][row] for row in rows] for rows in (names["before"][0], names["after"][0])]
    assert all("forbidden at Hare Lake all year" in found[0] for found in notices)
    assert f"also before  {notices[1][0]}" in said
