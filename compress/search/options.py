"""Options of the command line, checked before anything heavy is imported."""

from __future__ import annotations

import re
from typing import Any, get_args

from compress.common.errors import UserError, nearest
from compress.search.choices import check_choices
from compress.search.groups import Per
from compress.search.sensitivity import FEWEST, SensitivityOptions


def names_in(text: str | None) -> tuple[str, ...] | None:
    """Return the names of a list with commas; None for none."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def sensitivity_options(*, choices: str | None, per: str, device: str | None, **others: Any) -> SensitivityOptions:
    """Return the options of a sensitivity as the command line gives them.

    Raises:
        UserError: one cannot be.
    """
    if per not in get_args(Per):
        raise UserError(f"--per {per!r} is not known", nearest(per, get_args(Per)))
    named = names_in(choices)
    if named is not None:
        check_choices(named)
    for name in ("count", "scored"):
        if others[name] < FEWEST:
            raise UserError(f"--{name} {others[name]}: too few texts", f"at least {FEWEST}")
    from compress.runtimes.torch_runtime import pick_device

    place = "cpu" if others["runtime"] != "torch" else str(pick_device(device))
    return SensitivityOptions(choices=named, per=per, device=place, **others)  # type: ignore[arg-type]


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB)?", re.IGNORECASE)
_UNITS = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}


def size_of(text: str) -> float:
    """Return the bytes of a size such as `12MB` or `3 GB`; units are powers of ten.

    Raises:
        UserError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or float(found.group(1)) <= 0:
        raise UserError(f"--max-size {text!r} is not a size", "such as 12MB or 3GB")
    return float(found.group(1)) * _UNITS[(found.group(2) or "B").lower()]
