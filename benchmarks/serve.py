"""A server under load: latency and throughput by number of clients, CPU seconds a text against `encode`, and overload.

    python benchmarks/serve.py nano
    python benchmarks/serve.py results/<run> --texts texts.jsonl.gz --seconds 20 --clients 1,8,64,256

Clients send one text, then 32 texts a request, as base64, on connections that stay open, from one process, whose share of the CPU
is said. CPU seconds are those of the server and its computing process; `encode` runs in a process of its own, between the rows.
For overload four times the largest number of clients send at the same time, and come again a fifth of a second after a 429.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from compress.data.texts import measure_texts

ENCODE = """
import json, resource, sys, compress
texts = json.load(sys.stdin)
embedder = compress.load(sys.argv[1], device="cpu")
embedder.encode(texts[:256])
def used():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime
start = used()
embedder.encode(texts)
print((used() - start) / len(texts))
"""
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of the processes that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0.0
    for number in (pid, *map(int, children)):
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def memory(pid: int) -> float:
    """Megabytes of the server's own process."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1e3


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    texts: int = 0
    refused: int = 0


async def client(port: int, bodies: list[bytes], first: int, size: int, until: float, load: Load) -> None:
    """Send requests one after the other until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = first
    while time.perf_counter() < until:
        body = bodies[number % len(bodies)]
        number += 1
        start = time.perf_counter()
        writer.write(f"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r")[0])
        await reader.readexactly(length)
        status = int(head.split()[1])
        if status == 200:
            load.seconds.append(time.perf_counter() - start)
            load.texts += size
        elif status == 429:
            load.refused += 1
            await asyncio.sleep(0.2)
        else:
            raise SystemExit(f"status {status}")
    writer.close()


async def measure(port: int, texts: list[str], clients: int, size: int, seconds: float) -> Load:
    """Let clients send for some seconds."""
    groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
    bodies = [json.dumps({"model": "it", "input": group, "encoding_format": "base64"}).encode() for group in groups]
    load, until = Load(), time.perf_counter() + seconds
    await asyncio.gather(*(client(port, bodies, 7 * number, size, until, load) for number in range(clients)))
    return load


def own_cpu() -> float:
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime


def row(label: str, pid: int, port: int, texts: list[str], clients: int, size: int, seconds: float) -> float:
    """Measure, print a row, and return the server's CPU seconds a text."""
    before, ours, start = cpu_seconds(pid), own_cpu(), time.perf_counter()
    load = asyncio.run(measure(port, texts, clients, size, seconds))
    took = time.perf_counter() - start
    server, share = cpu_seconds(pid) - before, (own_cpu() - ours) / (took * (os.cpu_count() or 1))
    p50, p99 = np.percentile(np.array(load.seconds) * 1000, (50, 99)) if load.seconds else (np.nan, np.nan)
    cpu = 1000 * server / max(load.texts, 1)
    print(
        f"| {label} | {clients} | {size} | {load.texts / took:,.0f} | {p50:,.1f} | {p99:,.1f} | {cpu:.2f} | "
        f"{100 * share:.0f} % | {load.refused} | {memory(pid):,.0f} |",
        flush=True,
    )
    return server / max(load.texts, 1)


def start(model: str, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """Start a server; return it and its port once it is ready."""
    command = [sys.executable, "-m", "compress.cli", "serve", f"it={model}", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(": ready"):
            return process, int(line.partition("/v1")[0].rpartition(":")[2])
    raise SystemExit("the server did not start")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", default="mini")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--clients", default="1,8,64,256")
    parser.add_argument("--max-wait", default="10")
    arguments = parser.parse_args()
    texts = [text for text in measure_texts(arguments.texts, arguments.count, 0) if text]
    clients = [int(number) for number in arguments.clients.split(",")]
    process, port = start(arguments.model, ["--max-wait", arguments.max_wait])
    print("| | clients | texts a request | texts/s | p50 ms | p99 ms | CPU ms a text | clients' CPU | 429s | server MB |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    try:
        for number in clients:
            row("one text", process.pid, port, texts, number, 1, arguments.seconds)
        told = subprocess.run(
            [sys.executable, "-c", ENCODE, arguments.model], input=json.dumps(texts), capture_output=True, text=True, check=True
        )
        used = row("bulk", process.pid, port, texts, 64, 32, arguments.seconds)
        print(f"CPU a text over encode's: {used / float(told.stdout):.2f} (encode {1000 * float(told.stdout):.2f} ms)", flush=True)
        for part in range(3):
            row(f"overload {part + 1}", process.pid, port, texts, 4 * max(clients), 32, arguments.seconds)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


if __name__ == "__main__":
    main()
