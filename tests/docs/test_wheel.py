"""The wheel holds the whole package, data included, and answers `compress --help` and `compress plan` where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_is_complete_and_runs(tmp_path: Path) -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    source = tmp_path / "source"  # a copy: an old build folder beside the package would end up in the wheel
    for name in listed:
        if name.startswith("compress/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")

    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("compress/")}
    assert held == {name for name in listed if name.startswith("compress/")}

    installed = tmp_path / "installed"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(installed)}

    def answer(*words: str) -> str:
        command = [
            sys.executable,
            "-P",
            "-c",
            "import compress, sys; print(compress.__file__); from compress.cli import main; main()",
        ]
        found = subprocess.run([*command, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.startswith(str(installed)), "another copy of the package was imported"
        return found.stdout

    assert "Usage:" in answer("--help")
    assert "nano" in answer("plan", str(ROOT / "recipes" / "int8.yaml"))
    assert "NV-Embed-v2" in answer("plan", str(ROOT / "recipes" / "int4-gptq.yaml"), "--model", "nvidia/NV-Embed-v2")
