"""The cache: large results that are expensive to compute again, kept between runs outside of any checkout."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from compress.common.errors import UserError
from compress.common.files import naming

DEFAULT_LIMIT_GB = 50.0
# Kinds that may be removed: they are computed again when they are needed.
EVICTED = ("vectors", "scores", "sensitivity", "search")
KINDS = (*EVICTED, "random", "logs")
"""What the cache holds: vectors, scores, sensitivities, what searches made, checkpoints with random weights, logs of defects."""


def cache_root() -> Path:
    """Return the cache folder: `COMPRESS_CACHE` if set, else `compress-embedders` in the user's cache folder (XDG)."""
    given = os.environ.get("COMPRESS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-embedders"


def limit_bytes() -> int:
    """Return the size limit of the cache in bytes: `COMPRESS_CACHE_GB` x 10^9, by default 50 GB.

    Raises:
        UserError: the variable is not a number of at least 0.
    """
    given = os.environ.get("COMPRESS_CACHE_GB", str(DEFAULT_LIMIT_GB))
    try:
        limit = float(given) * 1e9
        if limit >= 0:
            return int(limit)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"COMPRESS_CACHE_GB is {given!r}, which is not a size in GB", "such as COMPRESS_CACHE_GB=50")


def use(kind: str, name: str) -> Path:
    """Return the folder of a cache entry and mark it as just used. When the cache is too large, the oldest entries are removed.

    Args:
        kind: kind of the entry, one of `KINDS`. Only entries of the kinds in `EVICTED` are ever removed.
        name: name of the entry; it must identify everything that determines the content.

    Raises:
        UserError: the cache cannot be written.
    """
    limit, folder = limit_bytes(), cache_root() / kind / name
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        _make_room(folder, limit)
    return folder


def _make_room(keep: Path, limit: int) -> None:
    """Remove the least recently used entries until the cache is within its limit."""
    folders = sorted((path for kind in EVICTED for path in (cache_root() / kind).glob("*") if path != keep), key=_used)
    sizes = {path: size_of(path) for path in (*folders, keep)}
    total = sum(sizes.values())
    for folder in folders:
        if total <= limit:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= sizes[folder]


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:  # another process has just removed it
        return 0.0


def size_of(place: Path) -> int:
    """Return the bytes of the files in a folder, or of a file; what other processes remove meanwhile does not count."""
    total = 0
    for path in place.rglob("*") if place.is_dir() else (place,):
        try:
            total += path.lstat().st_size if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


@dataclass(frozen=True)
class Entry:
    """An entry of the cache as `compress cache` lists it."""

    kind: str
    name: str
    bytes: int
    days: float
    """Days since it was last used."""
    path: Path


def entries() -> list[Entry]:
    """Return the cache's entries, by kind, the last used first."""
    now, found = time.time(), []
    for kind in KINDS:
        for path in (cache_root() / kind).glob("*"):
            if not path.name.startswith("."):
                found.append(Entry(kind, path.name, size_of(path), (now - _used(path)) / 86_400, path))
    return sorted(found, key=lambda entry: (KINDS.index(entry.kind), entry.days))


def empty(kinds: tuple[str, ...] = KINDS) -> Iterator[Entry]:
    """Remove the cache's entries, and yield each that was removed. Nothing else in the cache's folder is touched.

    Raises:
        UserError: an entry cannot be removed.
    """
    for entry in entries():
        if entry.kind not in kinds:
            continue
        with naming(entry.path):
            if entry.path.is_dir() and not entry.path.is_symlink():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink()
        yield entry
