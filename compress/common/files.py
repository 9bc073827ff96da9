"""Atomic writes: a file appears complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, atomically."""
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file under a temporary name in the same folder and rename it, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file under a temporary name in the same folder and rename it.

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np  # here, because commands that write no array answer without it

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            np.save(file, array)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Hand out a folder to be filled, and give it its name when the block ends; where that fails, nothing of it is left.

    Raises:
        UserError: the target is there already and not empty.
    """
    if is_taken(target):
        raise UserError(f"{target}: is there already", "give another folder, or delete this one")
    with filling(target) as folder:
        yield folder


def is_taken(target: Path) -> bool:
    """Whether there is something at a path other than an empty folder."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Hand out a folder to be filled, and give it its name when the block ends; where that fails, nothing of it is left."""
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
