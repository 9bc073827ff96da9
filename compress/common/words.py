"""The words of a command line before they are read: old spellings of options, and a `--ray` without an address."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from typer.core import TyperCommand

LOCAL_RAY = "local"
"""The address of a Ray that is started on this machine."""
RAY_ADDRESS = re.compile(r"local|auto|ray://.+|(\[[0-9a-f:]+\]|(?!hub:)[A-Za-z0-9.-]+):\d+")


def accepting(spellings: Mapping[str, str]) -> type[TyperCommand]:
    """Return a kind of command that also takes old spellings of its options, given with the new ones, and says the new one."""

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            end = args.index("--") if "--" in args else len(args)
            words = [renamed(word, spellings) for word in args[:end]]
            return super().parse_args(ctx, [*with_address(words), *args[end:]])

    return Command


def renamed(word: str, spellings: Mapping[str, str]) -> str:
    """Return a word of the command line with an old spelling of an option replaced by the new one, and say so."""
    name, equals, value = word.partition("=")
    if name not in spellings:
        return word
    print(f"{name} is now {spellings[name]}; the old spelling will be removed in the next release", file=sys.stderr)
    return f"{spellings[name]}{equals}{value}"


def with_address(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with `local` after a `--ray` that no address follows."""
    found: list[str] = []
    for word, following in zip(words, [*words, ""][1:], strict=True):
        found.append(word)
        if word == "--ray" and not RAY_ADDRESS.fullmatch(following):
            found.append(LOCAL_RAY)
    return found
