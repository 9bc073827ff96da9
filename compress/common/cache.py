"""The cache: large results that are expensive to compute again, kept between runs outside of any checkout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

DEFAULT_LIMIT_GB = 50.0
# Kinds that may be removed: they are computed again when they are needed.
EVICTED = ("vectors", "scores")


def cache_root() -> Path:
    """Return the cache folder: `COMPRESS_CACHE` if set, else `compress-embedders` in the user's cache folder (XDG)."""
    given = os.environ.get("COMPRESS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-embedders"


def limit_bytes() -> int:
    """Return the size limit of the cache in bytes: `COMPRESS_CACHE_GB` x 10^9, by default 50 GB."""
    return int(float(os.environ.get("COMPRESS_CACHE_GB", DEFAULT_LIMIT_GB)) * 1e9)


def use(kind: str, name: str) -> Path:
    """Return the folder of a cache entry and mark it as just used. When the cache is too large, the oldest entries are removed.

    Args:
        kind: kind of the entry: `vectors`, `scores`, `random`. Only entries of the kinds in `EVICTED` are ever removed.
        name: name of the entry; it must identify everything that determines the content.
    """
    folder = cache_root() / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    _make_room(folder)
    return folder


def _make_room(keep: Path) -> None:
    """Remove the least recently used entries until the cache is within its limit."""
    folders = sorted((path for kind in EVICTED for path in (cache_root() / kind).glob("*") if path != keep), key=_used)
    sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in (*folders, keep)}
    total = sum(sizes.values())
    for folder in folders:
        if total <= limit_bytes():
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= sizes[folder]


def _used(folder: Path) -> float:
    return folder.stat().st_mtime
