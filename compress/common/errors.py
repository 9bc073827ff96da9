"""Errors that a user can cause and mend: a sentence, and where it helps the nearest right answer."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What is wrong, in one line, and how to mend it, in another.

    The command line prints both and exits with 2; nothing else is caught there, so a traceback is always a bug of ours.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def nearest(name: str, names: Iterable[str]) -> str:
    """Say which of `names` was probably meant, or list them when none comes close.

    >>> nearest("steppes", ["steps", "model"])
    "did you mean 'steps'?"
    """
    known = sorted(names)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(known[:12]) + (f", ... ({len(known)} in all)" if len(known) > 12 else "")
    return f"known: {shown}"
