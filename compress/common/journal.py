"""The journal: results of a run's finished steps on disk, so that a stopped run continues."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.common.files import write_text_atomic


class Journal:
    """Stores the results of finished steps as JSON files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result stored under `key`; on the first call, in this process or an earlier one, compute it with `make`."""
        if not self.has(key):
            self.put(key, make())
        return self.get(key)

    def has(self, key: str) -> bool:
        """Whether a result is stored under `key`."""
        return self._path(key).exists()

    def get(self, key: str) -> dict[str, Any]:
        """Return the result stored under `key`."""
        kept: dict[str, Any] = json.loads(self._path(key).read_text(encoding="utf-8"))
        return kept

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Store `value` under `key`, replacing an earlier result."""
        write_text_atomic(self._path(key), json.dumps(value))

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', key)}.json"
