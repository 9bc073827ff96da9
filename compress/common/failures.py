"""What ended a command, in two lines for its user; a defect goes to a log."""

from __future__ import annotations

import datetime
import io
import os
import platform
import secrets
import sys
import tempfile
import traceback
from pathlib import Path

from compress.common.entry import DEFECT
from compress.common.errors import ElsewhereError, UserError
from compress.common.files import disk_error

WRONG = 2
KEPT_LOGS = 20
_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc", "not enough memory")


def told(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error, and the lines for standard error."""
    known = in_our_words(error)
    if known is not None:
        code = known.code if isinstance(known, ElsewhereError) else WRONG
        return code, f"error: {known.message}\n" + (f"{known.hint}\n" if known.hint else "")
    if hasattr(error, "show") and hasattr(error, "format_message"):  # typer's, about the command line
        shown = io.StringIO()
        error.show(file=shown)
        return WRONG, shown.getvalue()
    return DEFECT, _defect(error)


def in_our_words(error: BaseException) -> UserError | None:
    """Return the error as one that the user can mend; None where it is a defect of this package."""
    if isinstance(error, UserError):
        return error
    if type(error).__name__ == "Abort":  # typer's, of a question
        return UserError("no answer was given")
    if isinstance(error, RecursionError):
        return UserError("an input is nested too deeply to be read", "look for a file that is deeper than a few hundred levels")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in _MEMORY):
        return UserError(
            f"not enough memory ({_short(error)})",
            "smaller batches, --stream where the command has it, or more memory",
        )
    return disk_error(error, None)


def _defect(error: BaseException) -> str:
    """Keep the traceback of a defect and return the line about it."""
    said = f"error: a defect of this program: {type(error).__name__}: {_short(error)}"
    try:
        return f"{said}\nthe log is {_logged(error)}; please report it\n"
    except OSError as failed:
        return f"{said}\nno log could be written ({failed.strerror}); please report it\n"


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[0][:300]


def _logged(error: BaseException) -> Path:
    """Write the log of a defect: command, versions, traceback. Return its path."""
    when = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    head = f"{when}\ncommand: {sys.argv}\nfolder: {Path.cwd()}\npython {sys.version}\n{platform.platform()}\n\n"
    name = f"{when[:19].replace(':', '')}-{os.getpid()}-{secrets.token_hex(2)}.log"
    text = head + "".join(traceback.format_exception(error))
    for folder in _places():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        for old in sorted(folder.glob("*.log"))[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
        return folder / name
    descriptor, place = tempfile.mkstemp(prefix="compress-", suffix=".log")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return Path(place)


def _places() -> list[Path]:
    from compress.common.cache import cache_root

    return [cache_root() / "logs"]
