"""What an operator may set of a server. No FastAPI here."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compress.common.errors import UserError

MIB = 2**20
_NAMED = re.compile(r"(?P<name>[\w.-]+)=(?P<model>.+)", re.S)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how much may wait."""

    items: int = 2048
    """Largest number of inputs of a request."""
    tokens: int = 300_000
    """Largest number of tokens of a request, after texts were cut to the model's longest input."""
    body_bytes: int = 8 * MIB
    """Largest body of a request."""
    bodies_bytes: int = 256 * MIB
    """Largest sum of the bodies of all requests that are not answered yet."""
    waiting_tokens: int = 2_000_000
    """Largest number of tokens that wait for a model."""
    wait_seconds: float = 10.0
    """A request that would wait longer than this is refused with 429."""
    read_seconds: float = 30.0
    """Longest time for a request's head, for its body, and for its answer to be taken."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How models are opened; as for `compress.load`."""

    runtime: str | None = None
    devices: tuple[str, ...] = ()
    """Devices that the instances of a model take in turn; empty: the default one."""
    dtype: str | None = None
    threads: int | None = None
    """CPU threads of each instance; None: the cores, shared out evenly among the instances of a model."""
    instances: int = 1
    """Processes for each model."""


@dataclass(frozen=True)
class ServeOptions:
    """How models are served; the command's options."""

    host: str = "127.0.0.1"
    port: int = 8080
    key_variable: str | None = None
    """Environment variable with the API key that clients have to send."""
    without_key: bool = False
    """Whether a public address may be served without a key."""
    prompt: str | None = None
    """Name of the prompt that is put before texts whose request names none: query, document or a name of the model's."""
    dimensions: tuple[int, ...] = ()
    """Numbers of leading dimensions that the models were trained for, in addition to those that are known of a model."""
    template: str | None = None
    """What an instruction becomes, with {instruction} in its place; None: the model's own way."""
    limits: Limits = field(default_factory=Limits)
    opened: RuntimeOptions = field(default_factory=RuntimeOptions)

    def check(self) -> None:
        """See that the options fit together.

        Raises:
            UserError: an address outside of this machine is asked for without a key, or a value is out of range.
        """
        if not self.without_key and self.key_variable is None and not is_loopback(self.host):
            raise UserError(
                f"host {self.host!r}: reachable from other machines, and no API key is asked for",
                "--api-key-env NAME names the environment variable with the key; --without-key serves everybody",
            )
        if self.template is not None and "{instruction}" not in self.template:
            raise UserError(f"--instruction-template {self.template!r}: does not contain {{instruction}}")
        limits, opened = self.limits, self.opened
        least_one = {
            "--instances": opened.instances,
            "--threads": opened.threads,
            "--max-items": limits.items,
            "--max-tokens": limits.tokens,
            "--max-body": limits.body_bytes,
            "--max-waiting": limits.waiting_tokens,
        }
        for option, value in least_one.items():
            if value is not None and value < 1:
                raise UserError(f"{option}: must be at least 1, got {value}")
        for option, seconds in (("--max-wait", limits.wait_seconds), ("--read-timeout", limits.read_seconds)):
            if not 0 < seconds < float("inf"):
                raise UserError(f"{option}: must be above 0, got {seconds:g}")

    def key(self) -> str | None:
        """Return the API key; None: clients need none.

        Raises:
            UserError: the variable is not set.
        """
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise UserError(f"environment variable {self.key_variable!r} is not set", "--api-key-env names the one with the key")
        return key


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of which nothing is known
        return False


def named_models(words: Sequence[str]) -> list[tuple[str | None, str]]:
    """Read the models of the command line: `MODEL`, or `NAME=MODEL` to serve it under another name.

    Returns:
        For each word the name, None where none is given, and the model.
    """
    found: list[tuple[str | None, str]] = []
    for word in words:
        parts = None if Path(word).exists() else _NAMED.fullmatch(word)
        found.append((parts["name"], parts["model"]) if parts else (None, word))
    return found


def whole_numbers(words: str, option: str) -> tuple[int, ...]:
    """Read numbers that are separated by commas.

    Raises:
        UserError: one is no positive whole number; names the option.
    """
    found = [word.strip() for word in words.split(",") if word.strip()]
    for word in found:
        if not word.isdecimal() or int(word[:10]) < 1:
            raise UserError(f"{option}: {word!r} is no positive whole number", f"{option} 128,256")
    return tuple(map(int, found))
