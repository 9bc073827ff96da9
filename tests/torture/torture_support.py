"""Runs of a tiny recipe that something happens to, and what must be true of them afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECIPE = """
steps: [{method: rtn}]
measure: {what: [fidelity], count: 24}
evaluate: {tasks: [MiniSTS], baseline: float32}
"""
CALIBRATED = """
steps: [{method: gptq}]
calibration: {count: 16}
measure: {what: []}
evaluate: {tasks: []}
export: []
"""
TIMES = {"seconds", "created", "command", "measured_on"}


def without_times(value: Any) -> Any:
    """A record without what no two runs share."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def outcome_of(output: Path) -> dict[str, str]:
    """The digests of what a run has left: the variant's files, and the record without its times."""
    (folder,) = output.iterdir()
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "record.json" and "mteb" not in path.parts
    }
    return found | {"record": json.dumps(without_times(json.loads((folder / "record.json").read_text())), sort_keys=True)}


def left_in(root: Path) -> list[str]:
    """What nobody needs any more: hidden files and folders, and those that are not complete."""
    return [
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.name.startswith(".") or path.suffix in (".writing", ".partial")
    ]


class Lives:
    """The process that runs recipes, and the folder in which it does."""

    def __init__(self, folder: Path, model: Path, recipe: str = RECIPE) -> None:
        self.folder, self.model = folder, model
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(recipe)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "lives.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "COMPRESS_CACHE": str(folder / "warm-cache"),
            },
        )
        self._send({"recipe": str(self.recipe), "model": str(model), "output": str(folder / "warm")})
        assert self._line() == "ready"
        self.changes = 0
        root = self.fresh("whole")
        answer = self.live(root)
        assert answer["code"] == 0, answer["said"]
        self.changes, self.wanted = answer["count"], outcome_of(root / "out")

    def _send(self, request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, f"the process of the lives ended with {self._process.poll()}"
        return line

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def fresh(self, name: str) -> Path:
        """An empty folder for a run and its cache."""
        root = self.folder / name
        shutil.rmtree(root, ignore_errors=True)
        (root / "out").mkdir(parents=True)
        return root

    def live(self, root: Path, **how: Any) -> dict[str, Any]:
        """Run the recipe once; return exit code, what was printed, and how many changes of the file system there were."""
        (answer,) = self.together(root, 1, **how)
        return answer

    def together(self, root: Path, count: int, **how: Any) -> list[dict[str, Any]]:
        """Run the recipe in several processes at the same time."""
        base = {"root": str(root), "recipe": str(self.recipe), "model": str(self.model), **how}
        self._send([{**base, "log": str(self.folder / f"{root.name}-{number}.log")} for number in range(count)])
        answers: list[dict[str, Any]] = json.loads(self._line())
        return answers

    def check_continues(self, root: Path, place: str) -> None:
        """Run the recipe again; it must end as the run that nobody disturbed, and leave nothing over."""
        again = self.live(root)
        assert again["code"] == 0, f"{place}: {again['said']}"
        assert "Traceback" not in again["said"], place
        assert outcome_of(root / "out") == self.wanted, place
        assert left_in(root) == [], place
        shutil.rmtree(root)
