"""A real server process on loopback, for tests and for the clients that they use."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START_SECONDS = 180
PROMPTS = {"query": "query: ", "document": "passage: ", "title": "a title "}
"""Prompts of the tiny model `tiny`."""


@dataclass
class Server:
    """A server that runs."""

    process: subprocess.Popen[str]
    log: Path
    address: str = ""
    """`http://127.0.0.1:PORT`."""
    said: list[str] = field(default_factory=list)
    """Lines of standard error."""
    ready: threading.Event = field(default_factory=threading.Event)

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60
    ) -> tuple[int, Any, dict[str, str]]:
        """Send JSON, or bytes as they are; return the status, the answer and its headers."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"content-type": "application/json", **(headers or {})})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as response:
                status, content, found = response.status, response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, content, found = error.code, error.read(), error.headers
        kind = found.get("content-type", "")
        return (
            status,
            json.loads(content) if kind.startswith("application/json") else content.decode(errors="replace"),
            dict(found.items()),
        )

    def embed(self, input: Any, model: str = "tiny", **more: Any) -> tuple[int, Any]:
        status, answer, _ = self.ask("/v1/embeddings", {"model": model, "input": input, **more})
        return status, answer

    def lines(self) -> list[dict[str, Any]]:
        """The log."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def processes(self) -> list[int]:
        """The computing processes."""
        found = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(number) for number in found.split()]

    def memory(self) -> int:
        """Bytes of the server's own process that are in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


@contextmanager
def serving(folder: Path, *arguments: str | Path, wait: bool = True) -> Iterator[Server]:
    """Run `compress serve` on a free port; `folder` holds its log."""
    command = [sys.executable, "-m", "compress.cli", "serve", *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "log.jsonl"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, text=True, env=environment)
    server = Server(process, log)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        if wait:
            _wait(server)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        reader.join(10)


def _read(server: Server) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.said.append(line.rstrip())
        if line.startswith("http://") and not server.address:
            server.address = line.partition("/v1:")[0]
        if line.rstrip().endswith(": ready"):
            server.ready.set()


def _wait(server: Server) -> None:
    until = time.monotonic() + START_SECONDS
    while not server.ready.wait(0.1):
        if server.process.poll() is not None or time.monotonic() > until:
            raise AssertionError("the server did not get ready:\n" + "\n".join(server.said))
