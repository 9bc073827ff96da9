"""A disk that goes wrong at a chosen moment: the process is killed, the disk is full, or the power fails.

Python tells an audit hook of every change of the file system before it is made. What libraries write by themselves (safetensors) is seen
at the rename that follows, and at the writer that is wrapped here. A hook cannot be taken away again, so this belongs into a process of
its own (`lives.py`).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KILLED = 137
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime")


@dataclass
class _Entry:
    """A change of a folder's names that is not synced yet: something got the name `made`, perhaps from `taken`, in place of `lost`."""

    made: Path | None
    taken: Path | None
    lost: Path | None


class Disk:
    """Counts the changes under a folder, and fails at one of them."""

    def __init__(self, root: Path, fails: str | None = None, at: int = 0, seed: int = 0) -> None:
        """Watch a folder.

        Args:
            root: the folder; changes elsewhere are not looked at.
            fails: `kill`, `power` or `full`; None: nothing fails, changes are only counted.
            at: number of the change at which it fails, from 1.
            seed: decides what a power cut loses of what is not synced.
        """
        self.root, self.fails, self.at = root.resolve(), fails, at
        self.count = 0
        self._draw = random.Random(seed)
        self._synced: dict[int, tuple[int, int]] = {}
        self._entries: list[_Entry] = []
        self._backups = self.root.parent / f"{self.root.name}.backups"
        self._busy = False
        self._fsync = os.fsync

    def install(self) -> None:
        """Watch from now on."""
        self._backups.mkdir(exist_ok=True)
        for path in self.root.rglob("*"):  # what was there before has long been synced
            self._note(path)
        os.fsync = self._sync
        sys.addaudithook(self._hook)

    def wrap(self, module: Any, name: str) -> None:
        """Let a function that writes a file by itself (`name(tensors, path, ...)`) count as a change, and fail as the disk does."""
        write: Callable[..., Any] = getattr(module, name)

        def wrapped(tensors: Any, path: Any, *arguments: Any, **named: Any) -> Any:
            from safetensors import SafetensorError

            self.count += 1
            if self.fails == "full" and self.count >= self.at:
                Path(path).write_bytes(b"half") if not self._is_full_for(path) else None
                raise SafetensorError(
                    'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
                )
            if self.count == self.at and self.fails in ("kill", "power"):
                self._busy = True
                Path(path).write_bytes(b"half")
                self._fail()
            return write(tensors, path, *arguments, **named)

        setattr(module, name, wrapped)

    def _is_full_for(self, path: Any) -> bool:
        return not Path(path).exists()

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or (event != "open" and event not in CHANGES):
            return
        self._busy = True
        try:
            paths = self._paths(event, arguments)
            if paths:
                self._change(event, paths)
        finally:
            self._busy = False

    def _paths(self, event: str, arguments: tuple[Any, ...]) -> list[Path]:
        """Return the paths under the root that an event changes; none if it only reads."""
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return []
            names = [(name, -1)]
        elif event in ("os.rename", "os.link"):
            names = [(arguments[0], arguments[2]), (arguments[1], arguments[3])]
        elif event == "os.symlink":
            names = [(arguments[1], arguments[2])]
        else:
            names = [(arguments[0], arguments[-1] if event in ("os.remove", "os.rmdir", "os.mkdir", "os.utime") else -1)]
        paths = []
        for name, folder in names:
            if not isinstance(name, str | bytes | os.PathLike):
                return []
            base = Path(f"/proc/self/fd/{folder}").readlink() if isinstance(folder, int) and folder >= 0 else Path.cwd()
            paths.append(Path(os.path.normpath(base / os.fsdecode(name))))
        return paths if all(path.is_relative_to(self.root) for path in paths) else []

    def _change(self, event: str, paths: list[Path]) -> None:
        self.count += 1
        if self.fails in ("kill", "power") and self.count == self.at:
            self._fail()
        takes_room = event in ("os.mkdir", "os.link", "os.symlink") or (
            event == "open" and (not paths[0].exists() or paths[0].stat().st_size == 0)
        )
        if self.fails == "full" and self.count >= self.at and takes_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(paths[0]))
        if self.fails == "power":
            self._record(event, paths)

    def _record(self, event: str, paths: list[Path]) -> None:
        """Remember a change of names until its folder is synced."""
        if event == "os.rename":
            self._entries.append(_Entry(paths[1], paths[0], self._backup(paths[1])))
        elif event in ("os.remove", "os.rmdir"):
            self._entries.append(_Entry(None, paths[0], self._backup(paths[0])))
        elif event in ("os.mkdir", "open") and not paths[0].exists():  # mkdir is announced of folders that are there, too
            self._entries.append(_Entry(paths[0], None, None))

    def _backup(self, path: Path) -> Path | None:
        """Keep a file that is about to lose its name."""
        if not path.is_file() or path.is_symlink():
            return None
        kept = self._backups / f"{len(self._entries)}-{self.count}"
        os.link(path, kept)
        return kept

    def _sync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_relative_to(self.root) and not self._busy:
            self.count += 1
            if self.fails in ("kill", "power") and self.count == self.at:
                self._busy = True
                self._fail()
            if self.fails == "full" and self.count >= self.at and path.is_file():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if path.is_dir():
                self._entries = [entry for entry in self._entries if self._folder_of(entry) != path]
            else:
                self._note(path)
        self._fsync(descriptor)

    @staticmethod
    def _folder_of(entry: _Entry) -> Path:
        path = entry.made or entry.taken
        assert path is not None
        return path.parent

    def _note(self, path: Path) -> None:
        if path.is_file() and not path.is_symlink():
            found = path.stat()
            self._synced[found.st_ino] = (found.st_size, found.st_mtime_ns)

    def _fail(self) -> None:
        if self.fails == "power":
            self._lose()
        os._exit(KILLED)

    def _lose(self) -> None:
        """Lose what a disk may lose of what is not synced: the content of files, and the last changes of names."""
        for path in self.root.rglob("*"):
            if path.is_file() and not path.is_symlink():
                found = path.stat()
                if self._synced.get(found.st_ino) != (found.st_size, found.st_mtime_ns):
                    os.truncate(path, self._draw.choice((0, found.st_size // 2)))
        kept = self._draw.randint(0, len(self._entries))
        for entry in reversed(self._entries[kept:]):
            self._undo(entry)

    def _undo(self, entry: _Entry) -> None:
        if entry.made is not None and os.path.lexists(entry.made):
            if entry.taken is not None and entry.taken.parent.is_dir():
                entry.made.rename(entry.taken)
            elif entry.taken is None and entry.made.is_dir():
                shutil.rmtree(entry.made)
            elif entry.taken is None:
                entry.made.unlink()
        place = entry.made or entry.taken
        assert place is not None
        if entry.lost is not None and place.parent.is_dir() and not place.exists():
            os.link(entry.lost, place)
