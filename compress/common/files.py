"""Writes that last: a file or folder appears complete or not at all, also after a power cut; errors name the path.

What is written goes to a temporary file in the same folder, is synced to the disk and renamed, and the folder is synced in turn. So
neither a killed process nor a disk that lost power leaves half of it under its name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

TEMPORARY = ".writing"
"""How the name of a file ends that is not complete."""
PARTIAL = ".partial"
"""How the name of a folder ends that is not complete."""
FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)
# What libraries that write by themselves say of the system's error: safetensors "code: 28", others "(os error 28)".
_NUMBER = re.compile(r"\bcode: (\d+)|\bos error (\d+)|\berrno (\d+)", re.IGNORECASE)
_UNFINISHED = ("PytorchStreamWriter", "inline_container", "iostream error")


def disk_error(error: BaseException, path: Path | str | None) -> UserError | None:
    """Return an error of the file system in our words; None for any other error.

    Args:
        error: the error as Python, or a library that writes by itself, raised it.
        path: what was being read or written, where the error does not say; None: not known.
    """
    number = error.errno if isinstance(error, OSError) else _number_in(error)
    if number is None:
        return None
    place = getattr(error, "filename", None) or path
    if path is not None and str(place).endswith(TEMPORARY):
        place = path  # what the user asked for
    named = "" if place is None else f"{os.fsdecode(place)}: "
    if number in FULL:
        return UserError(
            f"{named}the disk is full", "nothing of it was left half-written; make room, then run the same command again"
        )
    if number == errno.ENAMETOOLONG:
        shown = named if len(named) < 100 else f"{named[:60]}...{named[-20:]}"
        return UserError(f"{shown}the name is too long for this file system", "give a shorter one")
    if number in _REFUSED:
        return UserError(f"{named}no permission ({os.strerror(number)})", "give another place, or change who may write there")
    if number in (errno.EMFILE, errno.ENFILE):
        return UserError(f"{named}too many files are open", "raise the limit: ulimit -n 4096")
    return UserError(f"{named}{os.strerror(number) if number else error}")


def _number_in(error: BaseException) -> int | None:
    """Return the system's error number in a library's message; None where there is none."""
    said = str(error)
    if type(error).__name__ == "SafetensorError" or "os error" in said:
        found = _NUMBER.search(said)
        return int(next(group for group in found.groups() if group)) if found else None
    if any(word in said for word in _UNFINISHED):  # torch does not pass on why it could not write
        return errno.ENOSPC
    return None


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a path in the errors of the file system that the block raises.

    Raises:
        UserError: in the place of such an error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        known = disk_error(error, path)
        if known is None:
            raise
        raise known from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, atomically."""
    write_text_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file, atomically; its folder is made if it is missing. A device, such as `/dev/stdout`, is written into.

    Raises:
        UserError: it cannot be written.
    """
    with naming(path):
        if is_special(path):
            with path.open("w", encoding="utf-8") as file:
                file.write(text)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file, atomically.

    Raises:
        UserError: the file cannot be written.
    """
    import numpy as np  # here, because commands that write no array answer without it

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a temporary path in the folder of `path`, and give it that name when the block ends; else nothing of it is left.

    A link keeps its place: what it points to is replaced.

    Raises:
        UserError: it cannot be written, or is a device, a pipe or a folder, which are not replaced.
    """
    with naming(path):
        if is_special(path):
            raise UserError(f"{path}: is not a regular file, and is not replaced by one", "give the name of a file")
        if path.is_dir():
            raise UserError(f"{path}: is a folder", "give the name of a file")
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        remove_abandoned_files(target.parent, quoted(target.name[:100]))
        temporary, descriptor = _temporary(target)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        sync_folder(target.parent)


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file for this process; return whether it is, and None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        return None
    return True


def _temporary(target: Path) -> tuple[Path, int]:
    """Make a temporary file next to a target, and lock it, which says to others that somebody is writing it."""
    while True:
        # Random, not the process's number: two containers that share the folder may have the same one.
        path = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}{TEMPORARY}")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        if try_lock(descriptor) is not False and is_at(path, descriptor):
            return path, descriptor
        os.close(descriptor)  # another process found it before it was locked, and took it for one that was left


def is_at(path: Path, descriptor: int) -> bool:
    """Whether a path still names an open file."""
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


def remove_abandoned_files(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left of files that they were writing: temporary files that nobody has locked.

    Args:
        folder: the folder.
        pattern: the names of the files that were written; by default all.
    """
    for path in folder.glob(f".{pattern}.{'?' * 12}{TEMPORARY}"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            if try_lock(descriptor):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def quoted(name: str) -> str:
    """Return a name as a pattern that matches only itself."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def is_special(path: Path) -> bool:
    """Whether a path is there and is neither a file nor a folder: a device, a pipe or a socket."""
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def check_target(path: Path, *, make_folders: bool = True) -> None:
    """Check before the work that a file can be written where the user wants it.

    Args:
        path: the file.
        make_folders: whether missing folders are going to be made; else the file's folder must be there.

    Raises:
        UserError: it cannot be written.
    """
    with naming(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder", "give the name of a file in it")
        folder = path.absolute().parent
        if not make_folders and not folder.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}", f"make it first: mkdir -p {path.parent}")
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"{path}: {folder} is not a folder")
        if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
            raise UserError(f"{path}: no permission to write there", "give another place")


def sync_folder(folder: Path) -> None:
    """Sync a folder's list of names to the disk, so that a rename in it outlasts a power cut.

    Raises:
        UserError: it cannot be written.
    """
    with naming(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
                raise
        finally:
            os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file in a folder, and all its folders, to the disk.

    Raises:
        UserError: one cannot be written.
    """
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            if path.is_symlink():
                continue
            with naming(path), path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


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
    with naming(target):
        return os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir()))


@contextmanager
def filling(target: Path) -> Iterator[Path]:
    """Hand out a folder to be filled, and give it its name when the block ends; where that fails, nothing of it is left.

    What an earlier process that was killed left of the same target is removed; a folder that anybody else made never is.

    Raises:
        UserError: it cannot be written.
    """
    from compress.common.locks import hold, remove_abandoned

    with naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target)
        folder = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}{PARTIAL}")
        folder.mkdir()
        try:
            with hold(folder):
                yield folder
                sync_tree(folder)
                folder.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
