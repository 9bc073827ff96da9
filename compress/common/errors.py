"""Errors that a user can cause and fix: what is wrong, and where possible the nearest right answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error of the user's: one line says what is wrong, another how to fix it.

    The command line prints both and exits with code 2. It catches nothing else, so a traceback is always a bug in this project.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = clipped(message)
        self.hint = hint
        super().__init__(self.message)


class ElsewhereError(UserError):
    """An error of another rank's, which ended this one too, with the same exit code."""

    def __init__(self, message: str, hint: str, code: int) -> None:
        super().__init__(message, hint)
        self.code = code


LONGEST_MESSAGE = 4_000
"""Characters. A message quotes what it is about, and a broken file may hold a value of megabytes."""


def clipped(text: str) -> str:
    """Leave out the middle of a text that is too long for a message: its beginning names the place, its end the remedy."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    half = LONGEST_MESSAGE // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


class BadTextError(UserError, ValueError):
    """Texts or settings of a call that a model cannot take; also a `ValueError`, as callers from Python expect."""


class NotFiniteError(UserError, FloatingPointError):
    """A model's numbers are not finite; also a `FloatingPointError`, as callers from Python expect."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind where it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def nearest(name: str, names: Iterable[str]) -> str:
    """Suggest which of `names` was meant, or list them when none is close.

    >>> nearest("steppes", ["steps", "model"])
    "did you mean 'steps'?"
    """
    known = sorted(names)
    if close := _closest(name, known):
        return f"did you mean {close!r}?"
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"known: {shown}"


def rename(missing: str, others: Iterable[str]) -> str:
    """Suggest which of the other columns of a file is the missing one under another name, or list them.

    >>> rename("text", ["texts", "label"])
    "rename 'texts' to 'text'"
    """
    known = sorted(others)
    if close := _closest(missing, known):
        return f"rename {close!r} to {missing!r}"
    return f"its other columns: {', '.join(known[:12]) or 'none'}"


def _closest(name: str, known: list[str]) -> str | None:
    """Return the known name that is most like another, if one is like it at all."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)
