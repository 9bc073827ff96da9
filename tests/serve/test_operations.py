"""Keys, limits, overload, processes that are killed, clients that leave, and the end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serve_support import Server, serving

KEY = {"authorization": "Bearer secret"}
TEXTS = [f"text number {number} " + "word " * (number % 30) for number in range(64)]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def strict(prompted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key and small limits."""
    limits = ["--max-items", "4", "--max-tokens", "100", "--max-body", "3000", "--max-waiting", "60"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVE_KEY", "secret")
        folder = tmp_path_factory.mktemp("strict")
        with serving(folder, f"tiny={prompted}", "--api-key-env", "SERVE_KEY", "--prompt", "query", *limits) as server:
            yield server


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}, {"authorization": "Basic x"}]
)
def test_without_the_key_nothing_is_answered(strict: Server, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/v1/embeddings", "/metrics", "/v1/nothing"):
        status, answer, found = strict.ask(path, None, headers)
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (401, "authentication_error", "invalid_api_key")
        assert found["www-authenticate"] == "Bearer"
    assert strict.ask("/health")[0] == strict.ask("/ready")[0] == 200


def test_limits_are_kept_and_named(strict: Server) -> None:
    def ask(input: Any) -> tuple[int, Any]:
        return strict.ask("/v1/embeddings", {"model": "tiny", "input": input}, KEY)[:2]

    assert ask(["a"] * 4)[0] == 200
    status, answer = ask(["a"] * 5)
    assert (status, "at most 4" in answer["error"]["message"]) == (400, True)
    status, answer = ask(["word " * 40] * 4)
    assert (status, answer["error"]["code"]) == (400, "max_tokens_per_request")
    status, answer = ask("x" * 3000)
    assert (status, answer["error"]["code"]) == (413, "request_too_large")


def test_the_operator_s_default_prompt_is_put_before_texts(strict: Server, prompted: Path) -> None:
    import compress

    vectors = [
        strict.ask("/v1/embeddings", {"model": "tiny", "input": "a", **more}, KEY)[1] for more in ({}, {"input_type": "title"})
    ]
    tiny = compress.load(str(prompted), device="cpu")
    for answer, prompt in zip(vectors, ("query: ", "a title "), strict=True):
        assert answer["data"][0]["embedding"] == pytest.approx(tiny.encode(["a"], prompt)[0].tolist(), abs=1e-6)
    assert strict.ask("/v1/models", None, KEY)[1]["data"][0]["default_prompt"] == "query: "


def test_overload_is_answered_with_429_and_a_time(strict: Server) -> None:
    answers: list[Any] = []
    for _ in range(10):  # a fast machine may bear a round
        with ThreadPoolExecutor(16) as threads:
            asked = [
                threads.submit(strict.ask, "/v1/embeddings", {"model": "tiny", "input": [text] * 2}, KEY) for text in TEXTS * 2
            ]
            answers += [future.result() for future in asked]
        if any(answer[0] == 429 for answer in answers):
            break
    refused = [answer for answer in answers if answer[0] == 429]
    assert {answer[0] for answer in answers} == {200, 429}
    for _, body, headers in refused:
        assert (body["error"]["type"], body["error"]["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert int(headers["retry-after"]) >= 1
    assert strict.ask("/v1/embeddings", {"model": "tiny", "input": "a"}, KEY)[0] == 200


def restarts(server: Server) -> float:
    """How many processes came back, by the server's own count."""
    found = re.search(r'^compress_process_restarts_total{model="tiny"} (\S+)$', server.ask("/metrics")[1], re.M)
    return float(found[1]) if found else 0


@pytest.fixture(scope="module")
def ended(prompted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with two processes for its model, which tests kill; the last test stops it under load."""
    with serving(tmp_path_factory.mktemp("ended"), f"tiny={prompted}", "--instances", "2") as server:
        yield server


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_processes_come_back_and_no_request_is_lost(ended: Server, kills: int) -> None:
    assert len(ended.processes()) == 2
    before = restarts(ended)
    statuses: list[int] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            statuses.append(ended.embed(TEXTS)[0])

    with ThreadPoolExecutor(4) as threads:
        clients = [threads.submit(client) for _ in range(4)]
        for _ in range(kills):
            until(lambda: len(statuses) > 0)
            statuses.clear()
            killed = ended.processes()
            os.kill(killed[0], signal.SIGKILL)
            until(lambda killed=killed: len(ended.processes()) == 2 and killed[0] not in ended.processes())
        stop.set()
        for one in clients:
            one.result()
    assert set(statuses) == {200}
    ready = 'compress_ready_processes{model="tiny"} 2.0'
    until(lambda: ready in ended.ask("/metrics")[1])
    assert restarts(ended) == before + kills


def test_a_client_that_leaves_costs_nothing(ended: Server) -> None:
    body = b'{"model": "tiny", "input": [' + b", ".join([b'"' + b"word " * 60 + b'"'] * 2000) + b"]}"
    head = f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    for _ in range(3):
        with ended.connect() as connection:
            connection.sendall(head + body)
            time.sleep(0.05)
    until(lambda: sum(line.get("error") == "client_left" for line in ended.lines()) == 3)
    until(lambda: 'compress_waiting_tokens{model="tiny"} 0.0' in ended.ask("/metrics")[1])
    assert "compress_open_body_bytes 0.0" in ended.ask("/metrics")[1]


def test_sigterm_under_load_loses_no_request_that_was_taken(ended: Server) -> None:
    """A request is answered: with its vectors if it was taken, with 503 or a refused connection if it came too late."""
    answers: list[int] = []
    refused = threading.Event()

    def client() -> None:
        while not refused.is_set():
            try:
                answers.append(ended.embed(TEXTS)[0])
            except OSError:
                refused.set()

    with ThreadPoolExecutor(8) as threads:
        clients = [threads.submit(client) for _ in range(8)]
        until(lambda: len(answers) > 8)
        ended.process.send_signal(signal.SIGTERM)
        assert ended.process.wait(60) == 0
        for one in clients:
            one.result()
    assert set(answers) <= {200, 503}
    statuses = [line["status"] for line in ended.lines() if line.get("items") == len(TEXTS)]
    assert set(statuses) == {200}
    assert answers.count(200) <= len(statuses)
    assert not any("Traceback" in line for line in ended.said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nanoo"], "did you mean 'nano'?"),
        (["nano", "--runtime", "onnxruntime"], "onnxruntime executes variants"),
        (["nano", "nano"], "two models are called 'nano'"),
        (["nano", "--prompt", "quary"], "did you mean 'query'?"),
        (["nano", "--host", "0.0.0.0"], "no API key is asked for"),
        (["nano", "--dimensions", "385"], "has vectors of 384 dimensions"),
    ],
)
def test_what_cannot_be_served_ends_in_two_lines(arguments: list[str], said: str) -> None:
    command = [sys.executable, "-m", "compress.cli", "serve", *arguments, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(strict: Server) -> None:
    command = [sys.executable, "-m", "compress.cli", "serve", "nano", "--port", str(strict.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{strict.port}: cannot be listened on" in done.stderr
