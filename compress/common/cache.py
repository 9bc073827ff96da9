"""Where what is dear and large is kept between runs, outside of any checkout."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

DEFAULT_LIMIT_GB = 50.0
# What can be made again without being asked for by name.
EVICTED = ("vectors", "scores")


def cache_root() -> Path:
    """Return the folder: `COMPRESS_CACHE` if it is set, else `compress-embedders` in the user's cache folder (XDG)."""
    given = os.environ.get("COMPRESS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-embedders"


def limit_bytes() -> int:
    """Return how large the cache may grow before what was used longest ago goes: `COMPRESS_CACHE_GB`, by default 50."""
    return int(float(os.environ.get("COMPRESS_CACHE_GB", DEFAULT_LIMIT_GB)) * 1e9)


def use(kind: str, name: str) -> Path:
    """Return the folder of one cached thing, marked as used now; others of its kind make room where the cache is too large.

    Args:
        kind: what it is: `vectors`, `scores`, `random`. Only folders of kinds in `EVICTED` are ever removed.
        name: which one; it says everything that decides the content.
    """
    folder = cache_root() / kind / name
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    _make_room(folder)
    return folder


def _make_room(keep: Path) -> None:
    """Remove the folders used longest ago until the rest is within the limit."""
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
