"""Locks between processes: one process at a time works at a run's folder, and others are told who has it.

A lock is a file next to what it protects, held with `flock`, which the system gives back when the process ends, however it ends.
Where the file system has no `flock`, the process that the file names is looked for. The file says pid, host and start time.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from compress.common.errors import UserError
from compress.common.files import PARTIAL, is_at, naming, quoted, try_lock

LOCK = ".lock"
POLL_SECONDS = 0.3


@dataclass(frozen=True)
class Owner:
    """The process that has a lock."""

    pid: int
    host: str
    started: float
    """When the process started, in seconds since the system did; tells it from a later one with the same pid. 0: not known."""

    @classmethod
    def this(cls) -> Owner:
        """Return this process."""
        return cls(os.getpid(), socket.gethostname(), _start(os.getpid()))

    @classmethod
    def read(cls, text: str) -> Owner | None:
        """Read what a lock says; None where it says nothing that can be read."""
        try:
            said = json.loads(text)
            return cls(int(said["pid"]), str(said["host"]), float(said["started"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def is_alive(self) -> bool:
        """Whether the process still runs. One of another host is taken to be."""
        if self.host != socket.gethostname():
            return True
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it runs, as another user
        now = _start(self.pid)
        return not (self.started and now) or abs(now - self.started) < 1

    def __str__(self) -> str:
        """Return who it is, for people."""
        return f"pid {self.pid} on {self.host}"


def _start(pid: int) -> float:
    """Return when a process started, in seconds since the system did; 0 where that cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


@contextmanager
def locked(
    path: Path, what: str, *, wait: bool = False, hint: str = "", say: Callable[[str], None] = lambda _: None
) -> Iterator[None]:
    """Hold a lock for the block.

    Args:
        path: the lock's file; it is there only while somebody holds it, or after a process that was killed.
        what: what it protects, for messages.
        wait: whether to wait until it is free, instead of raising.
        hint: what a user can do about a lock that is held.
        say: called once with a line, if it has to wait.

    Raises:
        UserError: another process has it.
    """
    waited = False
    while True:
        with naming(path):
            descriptor, owner = _take(path)
        if descriptor is not None:
            break
        if not wait:
            raise UserError(f"{what}: in use by {owner or 'another process'}", hint)
        if not waited:
            say(f"{what}: in use by {owner or 'another process'}; waiting")
        waited = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that nobody else's is removed
        os.close(descriptor)


def _take(path: Path) -> tuple[int | None, Owner | None]:
    """Try to take a lock; return its open file, or None and who has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        taken = False
        try:
            ours, other = try_lock(descriptor), Owner.read(_content(descriptor))
            if ours is False:
                return None, other
            if ours is None and other is not None and other != Owner.this() and other.is_alive():
                return None, other
            if is_at(path, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Owner.this())).encode(), 0)
                taken = True
                return descriptor, None
        finally:
            if not taken:
                os.close(descriptor)


def _content(descriptor: int) -> str:
    return os.pread(descriptor, 4096, 0).decode("utf-8", errors="replace")


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Mark a folder as being filled by this process, with a lock next to it."""
    with locked(folder.with_name(folder.name + LOCK), str(folder)):
        yield


def remove_abandoned(target: Path) -> None:
    """Remove what killed processes left of a folder that they were filling; each has its lock's file next to it, held by nobody."""
    for lock in target.parent.glob(f".{quoted(target.name[:100])}.*{PARTIAL}{LOCK}"):
        folder = lock.with_name(lock.name.removesuffix(LOCK))
        descriptor, _ = _take(lock)
        if descriptor is None:
            continue
        try:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
