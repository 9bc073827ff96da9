"""Reads files that come from outside, and names the file and the place in it where one is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.common.errors import UserError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not JSON; names the file and the line.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error
