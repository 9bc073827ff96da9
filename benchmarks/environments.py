"""Python environments for peers whose packages conflict with ours or with each other's."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from compress.common.cache import cache_root

# The version that we run ourselves; pip prefers a local CPU build of it where it can find one.
TORCH = "torch==2.13.0"
STAMP = "complete.json"


def add_environments_option(parser: argparse.ArgumentParser) -> None:
    """Add `--environments`."""
    parser.add_argument(
        "--environments",
        type=Path,
        default=cache_root() / "environments",
        help="folder for the peers' environments, which are reused",
    )


def python_of(name: str, requirements: Sequence[str], root: Path, *, torch: bool = True) -> Path:
    """Return the Python of an environment; create it if it is missing or has other packages.

    Args:
        name: its folder under `root`.
        requirements: what pip installs, all together.
        root: folder of the environments.
        torch: whether torch is among it, installed first: some packages look for it while they are built.
    """
    needed = [TORCH, *requirements] if torch else list(requirements)
    folder = root.resolve() / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted = json.dumps([sys.version_info[:2], *needed])
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making the environment {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    if torch:
        subprocess.run([*pip, TORCH, "setuptools", "wheel"], check=True)
    subprocess.run([*pip, *needed], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python
