"""What a run has finished, kept on disk so that a stopped run continues."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.common.files import write_text_atomic


class Journal:
    """Keeps the finished parts of a run on disk, so that a run that was stopped goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `make` returned the first time, now or in an earlier process; kept as JSON under `key`."""
        if not self.has(key):
            self.put(key, make())
        return self.get(key)

    def has(self, key: str) -> bool:
        """Whether something is kept under `key`."""
        return self._path(key).exists()

    def get(self, key: str) -> dict[str, Any]:
        """Return what is kept under `key`."""
        kept: dict[str, Any] = json.loads(self._path(key).read_text(encoding="utf-8"))
        return kept

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep `value` under `key`, in the place of what was there."""
        write_text_atomic(self._path(key), json.dumps(value))

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', key)}.json"
