"""The moment at which a run is done: one rename. What comes before can be continued, what comes after can be done again."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from compress.common.errors import UserError
from compress.common.files import naming, sync_folder, sync_tree
from compress.export import FORMATS
from compress.measure.record import RECORD_FILE
from compress.pipeline.findings import RECIPE_FILE, VARIANT

JOURNAL = "journal"
KEPT_FOLDERS = frozenset({VARIANT, "mteb", *FORMATS})
"""Folders that a finished run may have."""
OURS = frozenset({JOURNAL, RECORD_FILE, RECIPE_FILE, *KEPT_FOLDERS})
"""Everything that a run writes into its folder; whatever else is there is the user's."""


def begin(folder: Path, fresh: bool) -> None:
    """Remove of a run's hidden folder what cannot be continued: all of it if `fresh`, or if its journal or its variant is gone.

    The journal goes first, in one rename: without it nothing in the folder is taken for finished.
    """
    journal = folder / JOURNAL
    with naming(folder):
        lost = (journal / "steps.json").exists() and not (folder / VARIANT).is_dir()
        if journal.exists() and not fresh and not lost:
            return
        if journal.exists():
            journal.rename(folder / f"{JOURNAL}.{secrets.token_hex(4)}")
        _remove(folder)


def commit(folder: Path, final: Path) -> None:
    """Give a complete folder its name, and sync it all before and after.

    Where a folder of that name is there already (a record whose variant was taken away), it is set aside first; what in it a
    run does not write is moved into the new one.

    Args:
        folder: the hidden folder of the run, with its journal still in it.
        final: the run's folder.

    Raises:
        UserError: it cannot be written, or something that is no folder has its name.
    """
    with naming(final):
        sync_tree(folder)
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise UserError(f"{final}: is a link or a file, not a folder of a run", "move it away, then run the same command again")
        if final.exists():
            _set_aside(final, folder)
        os.rename(folder, final)  # noqa: PTH104  fails where something took the name in between, but for an empty folder
        sync_folder(final.parent)


def _set_aside(final: Path, folder: Path) -> None:
    """Move what the user keeps in an earlier folder into the new one, and remove the rest."""
    for path in sorted(final.iterdir()):
        if path.name not in OURS:
            place = folder / path.name
            while os.path.lexists(place):
                place = folder / f"{path.name}.{secrets.token_hex(2)}"
            path.rename(place)
    discard(final)


def discard(final: Path) -> None:
    """Remove an earlier run; whatever in its folder a run does not write stays.

    Raises:
        UserError: it is a link, or cannot be removed.
    """
    with naming(final):
        if final.is_symlink():
            raise UserError(f"{final}: is a link, and is not removed", "remove it yourself, or leave out --fresh")
        if not final.is_dir():
            return
        # The record goes first: without it, what a kill leaves is no run.
        for name in (RECORD_FILE, *sorted(OURS - {RECORD_FILE})):
            _remove(final / name)
        if not any(final.iterdir()):
            final.rmdir()


def tidy(final: Path, kept: frozenset[str]) -> None:
    """Remove from a run that is done what it needed on the way. If that is interrupted, the next call does it."""
    if not (final / JOURNAL).is_dir() or final.is_symlink():
        return
    with naming(final):
        for name in sorted(KEPT_FOLDERS - kept):
            _remove(final / name)
        _remove(final / JOURNAL)  # last: it says that there is something to remove


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
