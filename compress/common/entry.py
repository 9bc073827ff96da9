"""Where the command starts: it is ready for signals before anything heavy is imported, and every end has its own exit code.

0: done. 1: a gate was missed, a regression or a difference was found, and nothing else. 2: what the user can mend. 70: a defect of
this package. 130 and 143: stopped with Ctrl-C or SIGTERM. 141: nobody reads what is printed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

DEFECT = 70
UNREAD = 141
GRACE_SECONDS = 1.0
"""How long a stopped command may take to end in order; then it is ended."""
KEPT = {
    "run": "finished parts of the run are kept; the same command continues it",
    "sweep": "complete runs and finished parts of others are kept; the same command continues the sweep",
    "encode": "whole parts of a corpus are kept, and the same command continues them; a file of vectors is started over",
}
"""What is said of a command that was stopped and does not start over."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The command was asked to stop. A KeyboardInterrupt, so that libraries let it pass."""


class Stopping:
    """Turns the signals that ask a command to stop into `Stopped`, and ends the process if that takes too long."""

    def __init__(self) -> None:
        self.signal: int | None = None
        """The first signal that came."""
        self._lock = threading.RLock()
        self._said = False
        self._unraisable = sys.unraisablehook

    def install(self) -> None:
        """Handle the signals from now on. One that the caller ignores, as `nohup` does, stays ignored."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._stop)
        # Python runs handlers only between its own instructions; this file is written to at once, also while a library computes.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True, name="stopping").start()
        self._unraisable, sys.unraisablehook = sys.unraisablehook, self._swallowed

    def _swallowed(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Print no traceback where `Stopped` was raised in a finalizer, which lets nothing pass: `_watch` ends the process then."""
        if not isinstance(unraisable.exc_value, Stopped):
            self._unraisable(unraisable)

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            raise Stopped(number)

    def _watch(self, reading: int) -> None:
        """Wait for a signal; end the process if it is still there a while later."""
        numbers = {int(number) for number in _SIGNALS}
        while True:
            (number,) = os.read(reading, 1)
            if number in numbers and signal.getsignal(number) == self._stop:
                break
        threading.Event().wait(GRACE_SECONDS)
        self.end(number)

    def at_once(self) -> None:
        """From now on, as the interpreter is about to end, end the process at once on a signal: nothing can be raised now."""
        for number in _SIGNALS:
            if signal.getsignal(number) == self._stop:
                signal.signal(number, lambda number, _: self.end(number))

    def end(self, number: int) -> None:
        """Say how to go on, and end the process."""
        self.say(number)
        os._exit(128 + number)

    def say(self, number: int) -> None:
        """Say once that the command was stopped and how to go on."""
        with self._lock:
            if self._said:
                return
            self._said = True
            how = KEPT.get(sys.argv[1] if len(sys.argv) > 1 else "", "the same command starts over")
            why = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
            _print_error(f"error: stopped{why}\n{how}\n")


def _print_error(text: str) -> None:
    """Write to standard error, also from a thread while the interpreter is ending; where nobody listens, nothing is lost."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (RuntimeError, ValueError, AttributeError):  # it was being written to, is closed, or is none
        with contextlib.suppress(OSError):
            os.write(2, text.encode("utf-8", "backslashreplace"))
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the interpreter must not try again


def main(*, own_process: bool = True) -> None:
    """Run the command line and end the process with its exit code.

    Args:
        own_process: whether the process is the command's alone, so that signals are handled here; else a signal does what it did.
    """
    stopping = Stopping()
    if own_process:
        stopping.install()
    try:
        code = _outcome()
    except BaseException as error:
        code = _failed(error, stopping)
    if code > 128 and stopping.signal is not None:  # typer takes every interruption for Ctrl-C
        code = 128 + stopping.signal
    if code - 128 in _SIGNALS:
        stopping.say(code - 128)
    if own_process:
        stopping.at_once()
    _leave(code, at_once=own_process and stopping.signal is not None)


def _outcome() -> int:
    """Run the command line; return its exit code where it ends in order."""
    from compress.common.lazy import attribute  # here, as everything that takes time, once signals are handled

    return int(attribute("compress.cli:app")(standalone_mode=False) or 0)


def _failed(error: BaseException, stopping: Stopping) -> int:
    """Say what ended the command, in lines that a user understands; return the exit code."""
    if stopping.signal is not None or isinstance(error, KeyboardInterrupt):  # a library may have turned it into an error of its own
        return 128 + (stopping.signal or signal.SIGINT)
    if isinstance(error, SystemExit):
        if isinstance(error.__context__, BrokenPipeError):  # typer's own ending for it
            return UNREAD
        return error.code if isinstance(error.code, int) else 0 if error.code is None else DEFECT
    if isinstance(error, BrokenPipeError):
        return UNREAD
    from compress.common.failures import told

    code, text = told(error)
    _print_error(text)
    return code


def _leave(code: int, *, at_once: bool) -> None:
    """End the process with an exit code, whatever became of standard output.

    Args:
        code: the exit code.
        at_once: whether to leave out what the interpreter does at its end, which with large libraries takes seconds. Everything of
            ours is done by then.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = code or UNREAD
    except OSError as error:
        _print_error(f"error: standard output: cannot be written ({error.strerror})\n")
        code = code or 2
    else:
        if not at_once:
            sys.exit(code)
    os._exit(code)  # the interpreter would try to write the rest again
