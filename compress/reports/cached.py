"""What `compress cache` says and does: lists the cache, checks every entry, or empties it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from compress.common.cache import KINDS, Entry, cache_root, empty, entries, limit_bytes
from compress.common.errors import UserError, nearest
from compress.common.journal import read_entry
from compress.common.memory import gigabytes


def cache_report(action: str, kind: str | None = None) -> Iterator[str]:
    """List, check or empty the cache, and yield a line on each entry.

    Args:
        action: `list`, `check` or `empty`.
        kind: kind of the entries, of `KINDS`; None: all.

    Raises:
        UserError: there is no such action or kind, or an entry cannot be removed.
    """
    if action not in ACTIONS:
        raise UserError(f"cache {action!r} is not known", nearest(action, ACTIONS))
    if kind is not None and kind not in KINDS:
        raise UserError(f"--kind {kind!r} is not known", nearest(kind, KINDS))
    yield from ACTIONS[action]((kind,) if kind else KINDS)


def _listed(kinds: tuple[str, ...]) -> Iterator[str]:
    found = [entry for entry in entries() if entry.kind in kinds]
    for entry in found:
        yield f"{entry.kind:8} {gigabytes(entry.bytes):>10}  {entry.days:6.1f} days  {entry.name}"
    total = sum(entry.bytes for entry in found)
    yield f"{cache_root()}: {len(found)} entries, {gigabytes(total)} of at most {gigabytes(limit_bytes())}"


def _checked(kinds: tuple[str, ...]) -> Iterator[str]:
    found = [entry for entry in entries() if entry.kind in kinds]
    damaged = 0
    for entry in found:
        for files, why in _faults(entry):
            damaged += 1
            for file in files:
                file.unlink(missing_ok=True)
            yield f"{files[0]}: {why}; removed, it is made again when it is needed"
    yield f"{cache_root()}: {len(found)} entries checked, {damaged} damaged parts removed"


def _faults(entry: Entry) -> Iterator[tuple[list[Path], str]]:
    """Yield what is damaged in an entry: its files, and what is wrong with them."""
    from compress.runtimes.stored_vectors import SUFFIX, read_vectors, stored_in

    if entry.kind == "scores":
        for path in sorted(entry.path.glob("*.json")):
            try:
                read_entry(path)
            except ValueError as error:
                yield [path], str(error)
    if entry.kind == "vectors":
        for path in stored_in(entry.path):
            try:
                read_vectors(path)
            except (ValueError, FileNotFoundError) as error:
                yield [path] if path.suffix == SUFFIX else [path, path.with_suffix(".npy")], str(error)


def _emptied(kinds: tuple[str, ...]) -> Iterator[str]:
    removed = list(empty(kinds))
    yield f"{cache_root()}: {len(removed)} entries removed, {gigabytes(sum(entry.bytes for entry in removed))}"


ACTIONS: dict[str, Callable[[tuple[str, ...]], Iterator[str]]] = {"list": _listed, "check": _checked, "empty": _emptied}
