"""`make` takes the newest Python that runs, says so where none does, and the tools' versions agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.measure.record import Record

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import what_next  # noqa: E402

MAKE, SHELL = shutil.which("make"), shutil.which("sh")
pytestmark = pytest.mark.skipif(MAKE is None, reason="there is no make here")


def planned(folder: Path, *words: str, launchers: dict[str, int]) -> subprocess.CompletedProcess[str]:
    """Ask make what it would do where these Pythons alone are in the path, each ending with its exit code."""
    assert MAKE
    assert SHELL
    folder.mkdir()
    (folder / "sh").symlink_to(SHELL)
    for name, code in launchers.items():
        (folder / name).write_text(f"#!{SHELL}\nexit {code}\n")
        (folder / name).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    shutil.copy(ROOT / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return subprocess.run([MAKE, *words], cwd=folder, env=kept | {"PATH": str(folder)}, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("launchers", "taken"),
    [
        ({"python3.11": 0}, "python3.11"),
        ({"python3.11": 0, "python3.12": 0}, "python3.12"),
        ({"python3.11": 0, "python3.12": 0, "python3.13": 0}, "python3.13"),
        ({"python3.11": 0, "python3.12": 0, "python3.13": 127}, "python3.12"),
    ],
)
@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_newest_python_that_runs_is_taken(tmp_path: Path, target: str, launchers: dict[str, int], taken: str) -> None:
    found = planned(tmp_path / "bin", "-n", target, launchers=launchers)
    assert re.findall(r"^(\S+) -m venv \.venv$", found.stdout, re.M) == [taken]


def test_python_can_be_named(tmp_path: Path) -> None:
    found = planned(tmp_path / "bin", "-n", "demo", "PYTHON=/opt/python", launchers={"python3.13": 0})
    assert "/opt/python -m venv .venv" in found.stdout


def test_the_demo_makes_two_runs_then_shows_them_and_what_to_do_next(tmp_path: Path) -> None:
    found = planned(tmp_path / "bin", "-n", "demo", launchers={"python3.13": 0})
    steps = [
        line.removeprefix(".venv/bin/")
        for line in found.stdout.splitlines()
        if line.startswith(".venv/bin/") and " -m pip " not in line
    ]
    assert [step.split()[:2] for step in steps] == [
        ["compress", "run"], ["compress", "run"], ["compress", "compare"], ["compress", "dashboard"], ["python", "examples/what_next.py"],
    ]  # fmt: skip
    assert all((ROOT / word).exists() for step in steps for word in step.split() if word.startswith(("recipes/", "examples/")))


def test_the_demo_s_next_commands_are_commands_on_the_fastest_run(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from compress import cli
    from compress.export import FORMATS

    names = ("int8-nano-59384ab0", "int8-nano-d25c973e")
    runs = ROOT / "results"
    found = what_next.commands(runs)
    verbs = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    for words in found.values():
        verbs[words[0]].make_context(words[0], words[1:])  # as the command line reads it
    read = {folder: Record.read(folder) for folder in (runs / name for name in names)}
    fastest = what_next.fastest(read)
    assert fastest.name == max(read, key=lambda folder: next(iter(read[folder].row("variant").speedup.values()), 0)).name
    serve, export, run = found.values()
    assert (ROOT / serve[1]).is_dir()
    assert serve[1] == export[1]
    assert export[3] in FORMATS
    assert (ROOT / run[1]).exists() or Path(run[1]).exists()
    what_next.main(runs, ROOT / "page.html")
    printed = capsys.readouterr().out
    assert all(" ".join(words) in printed for words in found.values())
    assert (ROOT / "page.html").as_uri() in printed


def test_without_a_python_one_clear_line(tmp_path: Path) -> None:
    found = planned(tmp_path / "bin", "demo", launchers={"python3.13": 127, "python3.10": 0})
    assert found.returncode != 0
    first = found.stderr.splitlines()[0]
    assert first.startswith("no python3.11, python3.12 or python3.13 runs here")
    assert "make PYTHON=" in first


def test_the_hooks_use_the_versions_that_are_tested() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r"ruff==([\d.]+)", hooks)) == {pinned["ruff"]}
