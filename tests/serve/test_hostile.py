"""Requests that mean harm: no crash, no hang, no memory left behind."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serve_support import Server

HEAD = "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LARGE = 100 * 2**20
BLOCK = b"x" * 2**20
LEFT_BEHIND = 64 * 2**20
"""Bytes that the process may grow by: what allocators keep, and far below one large body."""


def send(connection: socket.socket, data: bytes) -> bool:
    """Send as much as the server takes."""
    try:
        connection.sendall(data)
    except OSError:
        return False
    return True


def status_of(connection: socket.socket, seconds: float = 30) -> int | None:
    """The status of the answer; None where the server closed the connection without one."""
    connection.settimeout(seconds)
    try:
        first = connection.recv(64)
    except ConnectionError:
        return None
    return int(first.split()[1]) if first.startswith(b"HTTP/1.1 ") else None


def with_length(server: Server, body: bytes, length: int | None = None) -> int | None:
    with server.connect() as connection:
        send(connection, f"{HEAD}content-length: {len(body) if length is None else length}\r\n\r\n".encode() + body)
        return status_of(connection)


def large_body(server: Server, draw: random.Random) -> set[int | None]:
    with server.connect() as connection:
        send(connection, f"{HEAD}content-length: {LARGE}\r\n\r\n".encode())
        for _ in range(LARGE // len(BLOCK)):
            if not send(connection, BLOCK):
                break
        return {status_of(connection)} - {413}


def large_body_in_chunks(server: Server, draw: random.Random) -> set[int | None]:
    with server.connect() as connection:
        send(connection, f"{HEAD}transfer-encoding: chunked\r\n\r\n".encode())
        for _ in range(LARGE // len(BLOCK)):
            if not send(connection, f"{len(BLOCK):x}\r\n".encode() + BLOCK + b"\r\n"):
                break
        return {status_of(connection)} - {413}


def wrong_length(server: Server, draw: random.Random) -> set[int | None]:
    body = json.dumps({"model": "tiny", "input": "a"}).encode()
    found = with_length(server, body, len(body) + draw.choice((-5, 1, 10**6)))
    nonsense = [draw.choice(("-1", "1e3", "99999999999999999999999", "abc", "0x10"))]
    with server.connect() as connection:
        send(connection, f"{HEAD}content-length: {nonsense[0]}\r\n\r\n".encode() + body)
        other = status_of(connection)
    return {found, other} - {400, 408, 413, None}


def slow_sender(server: Server, draw: random.Random) -> set[int | None]:
    """The head, or the body, byte by byte: the connection is closed when its time is over."""
    part = draw.choice((HEAD.encode(), f"{HEAD}content-length: 1000\r\n\r\n".encode()))
    with server.connect() as connection:
        send(connection, part)
        end = time.monotonic() + 20
        while time.monotonic() < end and send(connection, b"x"):
            connection.settimeout(0.2)
            try:
                answer = connection.recv(64)
            except TimeoutError:
                continue
            except ConnectionError:
                return set()
            return set() if not answer else {int(answer.split()[1])} - {408}
    return {0}


def half_closed(server: Server, draw: random.Random) -> set[int | None]:
    body = json.dumps({"model": "tiny", "input": "a"}).encode()
    with server.connect() as connection:
        send(connection, f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body[: draw.randrange(len(body) + 1)])
        connection.shutdown(socket.SHUT_WR)
        return {status_of(connection)} - {200, 400, None}


def gone_at_once(server: Server, draw: random.Random) -> set[int | None]:
    body = json.dumps({"model": "tiny", "input": ["word " * 50] * 100}).encode()
    with server.connect() as connection:
        send(connection, f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
    return set()


def unread_answer(server: Server, draw: random.Random) -> set[int | None]:
    body = json.dumps({"model": "tiny", "input": ["a"] * 2000}).encode()
    with server.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        send(connection, f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(draw.random())
    return set()


def bad_json(server: Server, draw: random.Random) -> set[int | None]:
    depth = draw.randrange(200, 200_000)
    bodies = [
        b"\xff\xfe" * 50,
        b'{"model": "tiny", "input": "\xc3\x28"}',
        b'{"model": "tiny", "input": "\\ud83d"}',
        b"[" * depth,
        b'{"a":' * depth,
        b'{"model": "tiny", "input": ' + b"[" * depth + b"]" * depth + b"}",
        b'{"model": "tiny", "input": [' + b"9" * depth + b"]}",
        b'{"model": "tiny", "input": [1e999]}',
        b'{"model": "tiny", "input": [NaN]}',
        b'{"model": "tiny", "input": [' + b"1," * 100_000 + b"1]}",
        b'{"model": "tiny", "input": [' + b"[]," * 50_000 + b"[]]}",
        bytes(draw.randrange(256) for _ in range(200)),
    ]
    return {with_length(server, draw.choice(bodies))} - {400, None}


def wrong_types(server: Server, draw: random.Random) -> set[int | None]:
    values = [None, True, 0, -1, 10**30, 1.5, "", "x", [], {}, [None], [{}], [[[]]], ["a", 1], [1, "a"], {"a": []}, "x" * 10_000]
    fields = (
        "input",
        "model",
        "encoding_format",
        "dimensions",
        "user",
        "input_type",
        "instruction",
        "prompt",
        "tokenizer",
        "other",
    )
    body = {"model": "tiny", "input": "a"} | {field: draw.choice(values) for field in draw.sample(fields, draw.randrange(1, 4))}
    return {with_length(server, json.dumps(body).encode())} - {200, 400, 404}


def bad_head(server: Server, draw: random.Random) -> set[int | None]:
    heads = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 50_000,
        b"POST /v1/embeddings HTTP/1.1\r\nx: " + b"y" * 300_000,
        b"GET /" + b"z" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET http://[/ HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /%ff%fe%00 HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET /v1/models/%00/../../etc HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        bytes(draw.randrange(256) for _ in range(500)),
    ]
    with server.connect() as connection:
        send(connection, draw.choice(heads))
        return {status_of(connection)} - {400, 404, 405, 408, 413, None}


KINDS: tuple[tuple[Callable[[Server, random.Random], set[int | None]], int], ...] = (
    (large_body, 1), (large_body_in_chunks, 1), (wrong_length, 4), (slow_sender, 3), (half_closed, 8), (gone_at_once, 5),
    (unread_answer, 2), (bad_json, 30), (wrong_types, 40), (bad_head, 12),
)  # fmt: skip
"""What is sent, and how often of 106 times."""


def attack(server: Server, rounds: int) -> None:
    """Send everything from several connections at the same time, and see that the server is as it was."""
    processes = server.processes()
    large_body(server, random.Random(0))
    before = server.memory()
    wanted = [kind for kind, share in KINDS for _ in range(share * rounds)]
    draw = random.Random(7)
    draw.shuffle(wanted)

    def one(task: tuple[int, Callable[[Server, random.Random], set[int | None]]]) -> tuple[str, set[int | None]]:
        number, kind = task
        return kind.__name__, kind(server, random.Random(number))

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(one, enumerate(wanted)))
    assert [entry for entry in found if entry[1]] == []
    assert server.process.poll() is None
    assert server.embed("a")[0] == 200
    assert server.processes() == processes
    end = time.monotonic() + 20
    while connections(server) > 1 and time.monotonic() < end:
        time.sleep(0.1)
    assert connections(server) <= 1
    assert "compress_open_body_bytes 0.0" in server.ask("/metrics")[1]
    assert 'compress_waiting_tokens{model="tiny"} 0.0' in server.ask("/metrics")[1]
    assert server.memory() - before < LEFT_BEHIND
    assert not any(line["status"] >= 500 for line in server.lines() if "status" in line)


def connections(server: Server) -> int:
    """Connections of the server that are open."""
    wanted = f":{server.port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(wanted) and row[3] == "01" for row in rows)


def test_a_hundred_hostile_requests(served: Server) -> None:
    attack(served, 1)


@pytest.mark.torture
def test_two_thousand_hostile_requests(served: Server) -> None:
    attack(served, 19)
