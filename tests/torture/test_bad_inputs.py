"""Broken and hostile inputs at the command line: no traceback, no hang, no memory, nothing outside, and a message that names the place.

`make test` draws some each day; `make torture` takes all of them.
"""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bad_inputs import CLASSES, all_cases

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SEED = int(os.environ.get("TORTURE_SEED", datetime.date.today().toordinal()))
FEW, MORE = 4, 24


def take(work: Path, *arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name("bad_inputs.py")), "--work", str(work), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    return done.stdout


def test_names_of_cases_are_unique() -> None:
    names = [case.full_name for case in all_cases([])]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("count", [FEW, pytest.param(MORE, marks=pytest.mark.slow)])
def test_some_bad_inputs(tmp_path: Path, count: int) -> None:
    take(tmp_path, "--draw", str(count), "--seed", str(SEED))


@pytest.mark.torture
@pytest.mark.parametrize("kind", CLASSES)
def test_bad_inputs(kind: str, tmp_path: Path) -> None:
    print(take(tmp_path, "--only", kind))
