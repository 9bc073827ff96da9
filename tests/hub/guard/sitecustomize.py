"""Loaded by every Python process of these tests before anything else: lets no connection leave loopback, and writes down what tried."""

import os
import socket
from pathlib import Path
from typing import Any

_look_up, _connect = socket.getaddrinfo, socket.socket.connect
LOOPBACK = ("127.0.0.1", "::1")


def _refuse(host: object) -> OSError:
    with Path(os.environ["NETWORK_LOG"]).open("a") as file:
        file.write(f"{host}\n")
    return OSError(f"the tests let nothing leave loopback: {host}")


def getaddrinfo(host: Any, *arguments: Any, **named: Any) -> Any:
    """Look up names of loopback only; every name below localhost is one (RFC 6761)."""
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and (name == "localhost" or name.endswith(".localhost")):
        name = "127.0.0.1"
    if name not in (None, *LOOPBACK):
        raise _refuse(name)
    return _look_up(name, *arguments, **named)


def connect(self: socket.socket, address: Any) -> None:
    """Connect to loopback and to local sockets only."""
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (*LOOPBACK, "localhost"):
        raise _refuse(address[0])
    _connect(self, address)


socket.getaddrinfo = getaddrinfo
socket.socket.connect = connect  # type: ignore[method-assign]
