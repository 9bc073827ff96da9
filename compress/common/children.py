"""Processes that this one starts end with it, however it ends."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
# Ctrl-C in a terminal goes to every process of the command; the first one ends the others, without their tracebacks.
# Both settings outlast the exec.
_TIE = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{{sys.argv[2]}}: {{error.strerror}}")
"""


def tied(command: Sequence[str | Path]) -> list[str]:
    """Return a command whose process ends when the one that starts it does, even if that is killed.

    A small Python that ties itself and then becomes the command; not `preexec_fn`, which may hang in a process with threads. On
    systems without `prctl` the command as it is.

    Raises:
        OSError: there is no such program.
    """
    words = [str(word) for word in command]
    if shutil.which(words[0]) is None:
        number = errno.EACCES if Path(words[0]).exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), words[0])
    return [sys.executable, "-I", "-S", "-c", _TIE, str(os.getpid()), *words] if sys.platform == "linux" else words


def end_with_parent() -> None:
    """Let this process, which `multiprocessing` started, end when the one that started it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
