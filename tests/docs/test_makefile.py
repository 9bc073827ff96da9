"""`make` takes the newest Python that runs, says so where none does, and the tools' versions agree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
