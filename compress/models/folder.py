"""A model's folder, read once."""

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


def transformer_folder(folder: Path) -> Path:
    """Return where the network's own files lie: the folder itself, or the one that modules.json gives the Transformer."""
    modules = folder / "modules.json"
    if modules.exists():
        for entry in read_json(modules):
            if str(entry["type"]).endswith(".Transformer"):
                return folder / str(entry["path"])
    return folder
