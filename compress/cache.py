"""Where what is dear and large is kept between runs, outside of any checkout."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the folder: `COMPRESS_CACHE` if it is set, else `compress-embedders` in the user's cache folder (XDG)."""
    given = os.environ.get("COMPRESS_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress-embedders"
