"""The one room that reads files from outside. What it hands on is bounded, of the right types and inside its folder.

Each file is a regular one, at most as large as its kind needs, UTF-8, nested a few levels and free of NaN and infinity. Its
content is a pydantic model that stands where the file's meaning is known. Whatever is wrong is a `UserError` that names the file
and the key.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from compress.common.errors import UserError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel, TypeAdapter, ValidationError

    M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

SETTINGS_BYTES = 64 * 2**20
"""Largest file of settings or results: far above any real one, far below what fills a memory."""
DEEPEST = 64
"""Levels of nested lists and mappings. Configs of the hub have at most six."""
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
BLOBS = "blobs"
"""Folder of the hub's cache that the links of its snapshots point into."""


@contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; a folder, a device or a pipe is refused before a byte of it is read.

    Raises:
        UserError: it is none, or cannot be read.
    """
    try:
        # A pipe without a writer would wait for one; with this flag it opens at once, and is then seen to be a pipe.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UserError(f"{path}: {KINDS.get(stat.S_IFMT(mode), 'a special file')}, not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def check_file(path: Path) -> None:
    """See that a path is a regular file, for readers that open it themselves.

    Raises:
        UserError: it is not, or cannot be read.
    """
    with open_file(path):
        return


def read_bytes(path: Path, limit: int = SETTINGS_BYTES) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        UserError: it is larger, is no regular file, or cannot be read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        # Files of /proc say that they are empty, so what was read counts too.
        content = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        raise UserError(f"{path}: larger than {limit:,} bytes, the most that such a file may have")
    return content


def read_text(path: Path, limit: int = SETTINGS_BYTES) -> str:
    """Read a UTF-8 file of at most `limit` bytes; a byte order mark at its start is dropped.

    Raises:
        UserError: see `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})", "save it as UTF-8") from error


class _NotFiniteError(ValueError):
    """A number of a JSON file that is none."""


def _refuse_constant(name: str) -> NoReturn:
    raise _NotFiniteError(f"{name} is not a number")


# Made once: `json.loads` makes a decoder for each call that gives it a hook.
_FINITE = json.JSONDecoder(parse_constant=_refuse_constant)


def parse_json(text: str, place: str) -> Any:
    """Parse JSON; `place` names where it stands in errors.

    Raises:
        UserError: it is not JSON, is nested too deeply, or holds NaN or infinity or a number of thousands of digits.
    """
    try:
        return _FINITE.decode(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "line" not in place.rpartition("/")[2] else ""
        raise UserError(f"{place}{line}: not JSON: {error.msg} at column {error.colno}") from error
    except _NotFiniteError as error:
        raise UserError(f"{place}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deeply") from error
    except ValueError as error:  # Python's bound on the digits of a number
        raise UserError(f"{place}: a number has too many digits") from error


def read_json(path: Path, limit: int = SETTINGS_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        UserError: see `read_text`, `parse_json` and `check_nesting`.
    """
    content = parse_json(read_text(path, limit), str(path))
    check_nesting(content, str(path))
    return content


def read_object(path: Path, limit: int = SETTINGS_BYTES) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: see `read_json`; or it holds something else.
    """
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object, this is a {type(content).__name__}")
    return content


def check_nesting(content: Any, place: str, deepest: int = DEEPEST) -> None:
    """See that nested lists and mappings are not deeper than code that walks them, and that every number is finite.

    Raises:
        UserError: they are, or one is not (JSON can write 1e999); names its key.
    """
    level: list[tuple[str, Any]] = [("", content)]
    for _ in range(deepest):
        below: list[tuple[str, Any]] = []
        for key, value in level:
            items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            for inner, item in items:
                if isinstance(item, (dict, list)):
                    below.append((f"{key}{inner}.", item))
                elif isinstance(item, float) and not math.isfinite(item):
                    raise UserError(f"{place}: {key}{inner}: {item} is not a finite number")
        if not below:
            return
        level = below
    raise UserError(f"{place}: {level[0][0].rstrip('.')[:80]}: nested more than {deepest} levels deep")


def read_as(path: Path, kind: type[M], hint: str = "", limit: int = SETTINGS_BYTES) -> M:
    """Read a JSON file as what a model says it is.

    Raises:
        UserError: see `read_json`; or a key is missing, unknown or of a wrong type; names file and key.
    """
    return checked(read_json(path, limit), kind, str(path), hint)


def checked(content: Any, kind: type[M], place: str, hint: str = "") -> M:
    """Return content as a model; `place` names where it was read.

    Raises:
        UserError: a key is missing, unknown or of a wrong type.
    """
    from pydantic import ValidationError

    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{place}: {fault_of(error)}", hint or _known(error, kind)) from error


def checked_by(content: Any, adapter: TypeAdapter[T], place: str, hint: str = "") -> T:
    """Return content as a type that is no model, such as a table of models; see `checked`."""
    from pydantic import ValidationError

    try:
        return adapter.validate_python(content)
    except ValidationError as error:
        raise UserError(f"{place}: {fault_of(error)}", hint) from error


def fault_of(error: ValidationError) -> str:
    """Return the first thing that pydantic found wrong, as `key: what is wrong, got this`."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "lax-", "json-")))
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "key not known"
    elif first["type"] == "missing":
        said = "missing"
    else:
        shown = repr(first["input"])
        said = f"{said[0].lower()}{said[1:]}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"
    return f"{key}: {said}" if key else said


def _known(error: ValidationError, kind: type[BaseModel]) -> str:
    """Suggest a key for one that a model does not have."""
    first = error.errors(include_url=False)[0]
    if first["type"] != "extra_forbidden" or len(first["loc"]) != 1:
        return ""
    return nearest(str(first["loc"][0]), kind.model_fields)


def inside(folder: Path, name: str, place: str) -> Path:
    """Return the path of a file or folder that a file of `folder` names; `place` says which file and key.

    Raises:
        UserError: the name leaves the folder, by being absolute or by `..`.
    """
    parts = Path(name).parts
    if Path(name).is_absolute() or ".." in parts or "\0" in name or "\\" in name:
        raise UserError(f"{place}: {name!r} leaves the folder {folder}", "it must be a path inside of the folder")
    return folder / name


def own_file(folder: Path, path: Path) -> Path:
    """Return a path in `folder` whose content may be copied elsewhere: no link leads out of the folder.

    The hub's cache keeps a snapshot's files as links into the `blobs` of the same model; these are its own files.

    Raises:
        UserError: the path is a link to a file of somewhere else.
    """
    root, real = folder.resolve(), path.resolve()
    roots = [root]
    if len(root.parents) > 1 and root.parent.name == "snapshots":
        roots.append(root.parents[1] / BLOBS)
    elif len(root.parents) > 2 and root.parents[1].name == "snapshots":
        roots.append(root.parents[2] / BLOBS)
    if not any(real.is_relative_to(place) for place in roots):
        raise UserError(f"{path}: a link to {real}, outside of {folder}, which is not copied", "copy the file into the folder")
    return path
