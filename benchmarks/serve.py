"""A server under load: latency and throughput by number of clients, CPU seconds a text against `encode`, and overload.

    python benchmarks/serve.py nano
    python benchmarks/serve.py results/<run> --texts texts.jsonl.gz --seconds 20 --clients 1,8,64,256 --out load.json
    python benchmarks/serve.py minilm --next-to 'infinity /v1 infinity_emb v2 --model-id FOLDER --port 7997 --url-prefix /v1'

Clients send one text, then 32 texts a request, as base64, on connections that stay open, from one process, whose share of the CPU
is said. CPU seconds are those of the server and its computing processes; `encode` runs in a process of its own, next to bulk rows.
For overload four times the largest number of clients send at the same time, and come again a fifth of a second after a 429.
`--next-to` starts another server, which gets the same requests in turn: a label, the path of its protocol, and its command, whose
`--port` says where it listens. All rounds are made in turn; a row gives the median of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.machine import machine
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


def processes(pid: int) -> list[int]:
    """A process and all that it started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(found for child in children for found in processes(int(child)))]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of the processes that it started."""
    total = 0.0
    for number in processes(pid):
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / TICKS
    return total


def memory(pid: int) -> float:
    """Megabytes in the memory of a process and of the processes that it started."""
    statuses = [Path(f"/proc/{number}/status").read_text() for number in processes(pid)]
    return sum(int(status.partition("VmRSS:")[2].split()[0]) for status in statuses) / 1e3


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)
    texts: int = 0
    refused: int = 0


@dataclass
class Server:
    """A server that is measured."""

    label: str
    process: subprocess.Popen[str]
    port: int
    path: str
    model: str

    def stop(self) -> None:
        """End it as an operator would."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


async def client(server: Server, bodies: list[bytes], first: int, size: int, until: float, load: Load) -> None:
    """Send requests one after the other until the time is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    number = first
    while time.perf_counter() < until:
        body = bodies[number % len(bodies)]
        number += 1
        start = time.perf_counter()
        head = f"POST {server.path}/embeddings HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        await read_body(reader, answer.lower())
        status = int(answer.split()[1])
        if status == 200:
            load.seconds.append(time.perf_counter() - start)
            load.texts += size
        elif status == 429:
            load.refused += 1
            await asyncio.sleep(0.2)
        else:
            raise SystemExit(f"{server.label}: status {status}")
    writer.close()


async def read_body(reader: asyncio.StreamReader, head: bytes) -> None:
    """Read the body of an answer, by its length or in chunks."""
    if b"content-length:" in head:
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r")[0]))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        await reader.readexactly(size + 2)
    await reader.readexactly(2)


async def measure(server: Server, texts: list[str], clients: int, size: int, seconds: float) -> Load:
    """Let clients send for some seconds."""
    groups = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
    bodies = [json.dumps({"model": server.model, "input": group, "encoding_format": "base64"}).encode() for group in groups]
    load, until = Load(), time.perf_counter() + seconds
    await asyncio.gather(*(client(server, bodies, 7 * number, size, until, load) for number in range(clients)))
    return load


def own_cpu() -> float:
    """CPU seconds of this process, which holds the clients."""
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime


def row(server: Server, texts: list[str], clients: int, size: int, seconds: float) -> dict[str, float]:
    """Measure once."""
    pid = server.process.pid
    before, ours, start = cpu_seconds(pid), own_cpu(), time.perf_counter()
    load = asyncio.run(measure(server, texts, clients, size, seconds))
    took = time.perf_counter() - start
    used, share = cpu_seconds(pid) - before, (own_cpu() - ours) / (took * (os.cpu_count() or 1))
    p50, p99 = np.percentile(np.array(load.seconds) * 1000, (50, 99)) if load.seconds else (np.nan, np.nan)
    return {
        "texts_per_second": load.texts / took,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms_per_text": 1000 * used / max(load.texts, 1),
        "clients_cpu_share": share,
        "refused": load.refused,
        "memory_mb": memory(pid),
    }


def encode_cpu_ms(model: str, texts: list[str]) -> float:
    """CPU milliseconds a text of `encode` in a process of its own, tokenizing included."""
    told = subprocess.run(
        [sys.executable, "-c", ENCODE, model], input=json.dumps(texts), capture_output=True, text=True, check=True
    )
    return 1000 * float(told.stdout)


def start(model: str, options: list[str]) -> Server:
    """Start our server; return once it is ready."""
    command = [sys.executable, "-m", "compress.cli", "serve", f"it={model}", "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.rstrip().endswith(": ready"):
            return Server("compress", process, int(line.partition("/v1")[0].rpartition(":")[2]), "/v1", "it")
    raise SystemExit("the server did not start")


def start_other(description: str) -> Server:
    """Start another server; return once it answers a request with a vector.

    Raises:
        SystemExit: it does not within three minutes.
    """
    label, path, *command = shlex.split(description)
    port = int(command[command.index("--port") + 1])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True)
    server = Server(label, process, port, path, "default")
    until = time.monotonic() + 180
    while time.monotonic() < until and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}/models") as answer:
                server.model = json.load(answer)["data"][0]["id"]
                return server
        except (OSError, ValueError):
            time.sleep(0.5)
    raise SystemExit(f"{label} did not start: {shlex.join(command)}")


COLUMNS = "| server | load | clients | texts a request | texts/s | p50 ms | p99 ms | CPU ms a text | clients' CPU | 429s | MB |"


def show(found: dict[str, Any]) -> str:
    """Return a row as Markdown."""
    return (
        f"| {found['server']} | {found['load']} | {found['clients']} | {found['size']} | {found['texts_per_second']:,.0f} | "
        f"{found['p50_ms']:,.1f} | {found['p99_ms']:,.1f} | {found['cpu_ms_per_text']:.2f} | "
        f"{100 * found['clients_cpu_share']:.0f} % | {found['refused']:,.0f} | {found['memory_mb']:,.0f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", default="mini")
    parser.add_argument("--count", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", default="1,8,64,256")
    parser.add_argument("--max-wait", default="10")
    parser.add_argument(
        "--overload", type=float, default=0, help="seconds of overload, in parts of `--seconds` and what is then waiting"
    )
    parser.add_argument("--next-to", action="append", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    texts = [text for text in measure_texts(arguments.texts, arguments.count, 0) if text]
    clients = [int(number) for number in arguments.clients.split(",")]
    loads = [("one text", number, 1) for number in clients] + [("bulk", 64, 32)]
    servers = [start(arguments.model, ["--max-wait", arguments.max_wait])]
    rows: list[dict[str, Any]] = []
    encode: list[float] = []
    try:
        servers += [start_other(description) for description in arguments.next_to]
        print(COLUMNS + "\n|---|---|" + "---:|" * 9)
        for label, number, size in loads:
            measured: dict[str, list[dict[str, float]]] = {server.label: [] for server in servers}
            for _ in range(arguments.rounds):
                for server in servers:
                    measured[server.label].append(row(server, texts, number, size, arguments.seconds))
                if label == "bulk":
                    encode.append(encode_cpu_ms(arguments.model, texts))
            for name, found in measured.items():
                middle = {key: float(np.median([each[key] for each in found])) for key in found[0]}
                rows.append({"server": name, "load": label, "clients": number, "size": size, **middle})
                print(show(rows[-1]), flush=True)
        ratio = next(found for found in rows if found["load"] == "bulk")["cpu_ms_per_text"] / float(np.median(encode))
        print(f"CPU a text in bulk over encode's: {ratio:.2f} (encode {np.median(encode):.2f} ms)", flush=True)
        until, part = time.monotonic() + arguments.overload, 0
        while time.monotonic() < until:
            found = row(servers[0], texts, 4 * max(clients), 32, arguments.seconds)
            rows.append({"server": "compress", "load": f"overload {part + 1}", "clients": 4 * max(clients), "size": 32, **found})
            part += 1
            print(show(rows[-1]), flush=True)
    finally:
        for server in servers:
            server.stop()
    if arguments.out is not None:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        report = {
            "settings": settings,
            "machine": machine(None).model_dump(),
            "rows": rows,
            "encode_cpu_ms": encode,
            "cpu_ratio": ratio,
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
