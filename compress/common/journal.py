"""The journal: results of a run's finished steps on disk, so that a stopped run continues."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.common.files import write_text_atomic
from compress.common.inputs import read_text

CHECKSUM, VALUE = "sha256", "value"


class Journal:
    """Stores the results of finished steps as JSON files in a folder. One that cannot be read is made again, and that is said."""

    def __init__(self, folder: Path, *, checked: bool = False) -> None:
        """Use a folder, which is made if it is missing.

        Args:
            folder: the folder.
            checked: whether results are stored with a checksum, as those should be that outlast a run.
        """
        self.folder = folder
        self._checked = checked

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result stored under `key`; on the first call, in this process or an earlier one, compute it with `make`."""
        kept = self._read(key)
        if kept is None:
            self.put(key, make())
            kept = self.get(key)
        return kept

    def has(self, key: str) -> bool:
        """Whether a result is stored under `key`."""
        return self._read(key) is not None

    def get(self, key: str) -> dict[str, Any]:
        """Return the result stored under `key`.

        Raises:
            KeyError: there is none.
        """
        kept = self._read(key)
        if kept is None:
            raise KeyError(key)
        return kept

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Store `value` under `key`, replacing an earlier result."""
        write_text_atomic(self.path(key), json.dumps({CHECKSUM: checksum(value), VALUE: value} if self._checked else value))

    def path(self, key: str) -> Path:
        """Return the file that a result is stored in."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', key)}.json"

    def _read(self, key: str) -> dict[str, Any] | None:
        path = self.path(key)
        try:
            return read_entry(path)
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"{path}: is damaged ({error}); made again", file=sys.stderr, flush=True)
            return None


def checksum(value: dict[str, Any]) -> str:
    """Return the SHA-256 of a result, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_entry(path: Path) -> dict[str, Any]:
    """Read a stored result; one of an earlier version has no checksum.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    try:
        kept = json.loads(read_text(path))
    except UserError as error:
        raise ValueError(error.message.removeprefix(f"{path}: ")) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(kept, dict):
        raise ValueError("not a JSON object")
    if set(kept) != {CHECKSUM, VALUE}:
        return kept
    value: dict[str, Any] = kept[VALUE]
    if not isinstance(value, dict) or checksum(value) != kept[CHECKSUM]:
        raise ValueError("its checksum differs")
    return value
