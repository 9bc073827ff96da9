"""Throughput, latency and memory. Every embedder runs in a fresh process, and they take turns within each round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.common.card import Card
from compress.common.children import tied


class Cell(BaseModel):
    """Time of a batch of equally long texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int
    """Number of texts."""
    length: int
    """Tokens of each text, special tokens included."""
    seconds: float
    """Median over the rounds."""


class Speed(BaseModel):
    """Speed and memory of one embedder in its own process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts_per_second: float
    """Median over the rounds."""
    tokens_per_second: float
    """Median over the rounds, in tokens after truncation, without padding."""
    seconds: tuple[float, ...]
    """Seconds of each round, in order."""
    latency_p50_ms: float
    """Median time of a single text."""
    latency_p99_ms: float
    """99th percentile of the time of a single text."""
    threads: int | None
    """CPU threads. None if the embedder does not say."""
    loaded_bytes: int | None
    """Anonymous memory once the model is loaded, minus that after the imports. None if the kernel does not say."""
    peak_bytes: int | None
    """Peak anonymous memory while encoding, minus that after the imports. None if the kernel does not say."""
    gpu_peak_bytes: int | None
    """Peak GPU memory while encoding. None without a GPU."""
    cells: tuple[Cell, ...] = ()
    """Time by batch size and length: equally long texts, if the recipe asks for it, and on a GPU."""
    batching: str | None = None
    """How texts share a batch: `packed` or `padded`. None if the embedder does not say, and in older records."""
    small_requests: str | None = None
    """What runs a single short text on a GPU, such as CUDA graphs. None without a GPU."""
    ids_seconds: tuple[float, ...] = ()
    """Seconds of each round from token ids to vectors, by the GPU's events: `seconds` without tokenizing. Empty without a GPU."""
    cards: tuple[Card, ...] = ()
    """The GPU after each round, with its clocks. Empty without a GPU, or without `nvidia-smi`."""


@dataclass(frozen=True)
class Candidate:
    """An embedder to measure. The fresh process calls `loader` ("module:function") with `arguments`."""

    arguments: Mapping[str, Any]
    loader: str = "compress.runtimes.loading:load"
    environment: Mapping[str, str] = field(default_factory=dict)


class WorkerProcess:
    """A running `compress.measure.speed.worker`."""

    def __init__(self, candidate: Candidate, threads: int | None) -> None:
        environment = {**os.environ, **candidate.environment}
        # A file, not a pipe: nothing reads it while the process works, and a full pipe would block the process.
        self._printed = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            tied([sys.executable, "-m", "compress.measure.speed.worker"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            text=True,
            env=environment,
        )
        try:
            self.loaded = self.ask("load", loader=candidate.loader, arguments=dict(candidate.arguments), threads=threads)
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            RuntimeError: the process ended instead; the message has the end of what it printed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._printed.seek(0)
            raise RuntimeError(f"the measuring process ended with code {code}:\n{self._printed.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._printed.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def measure_speed(
    candidates: Mapping[str, Candidate],
    texts: Sequence[str],
    *,
    rounds: int,
    requests: int,
    batch_tokens: int | None = None,
    threads: int | None = None,
    cells: Sequence[tuple[int, int]] = (),
) -> dict[str, Speed]:
    """Measure candidates on the same texts, interleaved: A B C, A B C, ... A machine that drifts then drifts for all of them.

    All processes are loaded before the first round, and only one works at a time. A first pass over the texts warms up each
    process; it is not timed, and memory is measured during it.

    Args:
        candidates: embedders by name.
        texts: texts of the throughput rounds.
        rounds: number of rounds.
        requests: number of single texts that are encoded for latency, over all rounds.
        batch_tokens: padded tokens that a batch may hold; None: the embedder's default.
        threads: CPU threads of each process; None: all cores.
        cells: pairs of batch size and text length in tokens to time in addition. A length that an embedder would truncate is left
            out for it.

    Raises:
        RuntimeError: a process ended before it answered.
    """
    texts = list(texts)
    singles = [texts[index % len(texts)] for index in range(requests)]
    workers: dict[str, WorkerProcess] = {}
    peaks: dict[str, dict[str, Any]] = {}
    try:
        for name, candidate in candidates.items():
            workers[name] = WorkerProcess(candidate, threads)
            peaks[name] = workers[name].ask("memory", texts=texts, batch_tokens=batch_tokens)
        tokens = next(iter(workers.values())).ask("count", texts=texts)["tokens"]
        times = {name: _Times() for name in workers}
        for turn in range(rounds):
            for name, worker in workers.items():
                times[name].add(worker.ask("throughput", texts=texts, batch_tokens=batch_tokens))
                times[name].latencies += worker.ask("latency", texts=singles[turn::rounds])["seconds"]
            for batch, length in cells:
                for name, worker in workers.items():
                    took = worker.ask("cell", batch=batch, length=length)["seconds"]
                    if took is not None:
                        times[name].cells.setdefault((batch, length), []).append(took)
        return {
            name: times[name].speed(len(texts), tokens, **worker.loaded, **peaks[name], **worker.ask("ways"))
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


@dataclass
class _Times:
    """Seconds of one embedder, as the rounds add them."""

    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    ids: list[float] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    cells: dict[tuple[int, int], list[float]] = field(default_factory=dict)

    def add(self, round: Mapping[str, Any]) -> None:
        """Add a round, as the worker's `throughput` answers."""
        self.seconds.append(round["seconds"])
        if round["ids_seconds"] is not None:
            self.ids.append(round["ids_seconds"])
        if round["card"] is not None:
            self.cards.append(Card(**round["card"]))

    def speed(self, texts: int, tokens: int, **others: Any) -> Speed:
        """Summarize the rounds; `others` has the fields of `Speed` that are no times."""
        middle = median(self.seconds)
        cells = (Cell(batch=batch, length=length, seconds=median(took)) for (batch, length), took in self.cells.items())
        return Speed(
            texts_per_second=texts / middle,
            tokens_per_second=tokens / middle,
            seconds=tuple(self.seconds),
            latency_p50_ms=float(np.percentile(self.latencies, 50)) * 1e3,
            latency_p99_ms=float(np.percentile(self.latencies, 99)) * 1e3,
            cells=tuple(cells),
            ids_seconds=tuple(self.ids),
            cards=tuple(self.cards),
            **others,
        )


def speed_ratio(variant: Speed, baseline: Speed) -> float:
    """Return how many times as fast `variant` is: the median of the rounds' ratios, in which drift cancels."""
    return median(theirs / ours for ours, theirs in zip(variant.seconds, baseline.seconds, strict=True))
