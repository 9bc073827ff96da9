"""Messages between the server and its computing processes: a JSON head and a binary body, both with their length before them."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import IO, Any

_LENGTHS = struct.Struct("<II")


def packed(head: dict[str, Any], body: bytes = b"") -> bytes:
    """Return a message as bytes."""
    words = json.dumps(head).encode()
    return _LENGTHS.pack(len(words), len(body)) + words + body


def read(file: IO[bytes]) -> tuple[dict[str, Any], bytes] | None:
    """Read a message from a file; None at its end."""
    lengths = file.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None
    words, body = _LENGTHS.unpack(lengths)
    head = file.read(words)
    content = file.read(body)
    if len(head) < words or len(content) < body:
        return None
    found: dict[str, Any] = json.loads(head)
    return found, content


async def read_async(stream: asyncio.StreamReader) -> tuple[dict[str, Any], bytes]:
    """Read a message from a stream.

    Raises:
        asyncio.IncompleteReadError: the stream ends.
    """
    words, body = _LENGTHS.unpack(await stream.readexactly(_LENGTHS.size))
    head: dict[str, Any] = json.loads(await stream.readexactly(words))
    return head, await stream.readexactly(body)
