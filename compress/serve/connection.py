"""An HTTP connection that costs a bounded amount of memory and time, however its client behaves."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 65_536
"""Largest head of a request."""
CONNECTIONS = 4096
"""Most connections at a time; more are closed at once."""


def bounded(seconds: float) -> type[HttpToolsProtocol]:
    """Return a protocol for uvicorn whose requests' heads, and the taking of answers, may last so many seconds."""

    class BoundedConnection(HttpToolsProtocol):
        """uvicorn's protocol, which bounds neither the head of a request nor how slowly a client reads."""

        _timer: asyncio.TimerHandle | None = None
        _in_head = True
        _head_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            # The head and the body of an answer are two writes. asyncio sets this only on sockets that were made with a protocol's
            # number; without it the body waits for the client to acknowledge the head, 40 ms on Linux.
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self.connections) > CONNECTIONS:
                transport.abort()
                return
            self._arm()

        def _arm(self) -> None:
            self._disarm()
            self._timer = self.loop.call_later(seconds, self.transport.abort)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0
            self._arm()

        def data_received(self, data: bytes) -> None:
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

        def on_headers_complete(self) -> None:
            self._in_head = False
            self._disarm()
            super().on_headers_complete()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._head_bytes = 0

        def pause_writing(self) -> None:
            super().pause_writing()
            self._arm()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._disarm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

    return BoundedConnection
