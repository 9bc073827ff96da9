"""The texts that the doctor encodes: twenty of many kinds, two of them longer than most models read. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from compress.data.texts import suite_texts


@dataclass(frozen=True)
class ProbeText:
    """A text and what is special about it."""

    kind: str
    text: str
    long: bool
    """Whether a model may have to cut it."""


@cache
def probe_texts() -> tuple[ProbeText, ...]:
    """Return the built-in texts; the long ones are sentences of the embedded suite, none of them twice, so that every cut shows."""
    entries = json.loads((resources.files("compress.data") / "doctor.json").read_text(encoding="utf-8"))
    return tuple(ProbeText(entry["kind"], entry.get("text") or _long(entry), "words" in entry) for entry in entries)


def _long(entry: dict[str, int]) -> str:
    if "words" not in entry:
        return ""
    words = " ".join(suite_texts()[entry["from"] :]).split()
    return " ".join(words[: entry["words"]])
