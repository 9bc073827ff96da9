"""Throughput, latency and memory: every embedder in a fresh process, all of them in turn within each round."""

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


class Cell(BaseModel):
    """How long a batch of equally long texts takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int
    """Texts."""
    length: int
    """Tokens of each, special tokens counted."""
    seconds: float
    """Median over the rounds."""


class Speed(BaseModel):
    """What one embedder did in its own process."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts_per_second: float
    """Median over the rounds."""
    tokens_per_second: float
    """The same texts, counted in tokens after truncation, padding not counted."""
    seconds: tuple[float, ...]
    """Of each round, in order."""
    latency_p50_ms: float
    latency_p99_ms: float
    """Of one text at a time."""
    threads: int | None
    """CPU threads; None where the measured does not tell."""
    loaded_bytes: int | None
    """Anonymous memory above the process's imports once the model is ready; None where the kernel does not tell."""
    peak_bytes: int | None
    """The same, at its peak while encoding."""
    gpu_peak_bytes: int | None
    cells: tuple[Cell, ...] = ()
    """Time by batch and length, where it was asked for."""


@dataclass(frozen=True)
class Candidate:
    """An embedder to measure: `loader` ("module:function") is called with `arguments` in the fresh process."""

    arguments: Mapping[str, Any]
    loader: str = "compress.runtimes.loading:load"
    environment: Mapping[str, str] = field(default_factory=dict)


class WorkerProcess:
    """A running `compress.measure.speed.worker`."""

    def __init__(self, candidate: Candidate, threads: int | None) -> None:
        environment = {**os.environ, **candidate.environment}
        # A file, not a pipe: nobody reads while the process works, and a full pipe would stop it.
        self._printed = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compress.measure.speed.worker"],
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
            RuntimeError: the process ended instead; carries the end of what it printed.
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
    """Measure candidates on the same texts, interleaved: A B C, A B C, ... so that a drifting machine drifts for all.

    `cells`: numbers of texts and tokens at which time is measured besides; a length that an embedder cuts is left out for it.
    All processes are loaded before the first round and only one works at a time. An uncounted first
    pass over the texts warms each, and is the one whose memory is watched.
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
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        latencies: dict[str, list[float]] = {name: [] for name in workers}
        timed: dict[str, dict[tuple[int, int], list[float]]] = {name: {} for name in workers}
        for turn in range(rounds):
            for name, worker in workers.items():
                seconds[name].append(worker.ask("throughput", texts=texts, batch_tokens=batch_tokens)["seconds"])
                latencies[name] += worker.ask("latency", texts=singles[turn::rounds])["seconds"]
            for batch, length in cells:
                for name, worker in workers.items():
                    took = worker.ask("cell", batch=batch, length=length)["seconds"]
                    if took is not None:
                        timed[name].setdefault((batch, length), []).append(took)
        return {
            name: Speed(
                texts_per_second=len(texts) / median(seconds[name]),
                tokens_per_second=tokens / median(seconds[name]),
                seconds=tuple(seconds[name]),
                latency_p50_ms=float(np.percentile(latencies[name], 50)) * 1e3,
                latency_p99_ms=float(np.percentile(latencies[name], 99)) * 1e3,
                threads=worker.loaded["threads"],
                loaded_bytes=worker.loaded["loaded_bytes"],
                cells=tuple(
                    Cell(batch=batch, length=length, seconds=median(took)) for (batch, length), took in timed[name].items()
                ),
                **peaks[name],
            )
            for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def speed_ratio(variant: Speed, baseline: Speed) -> float:
    """Return how many times as fast `variant` is: the median of the rounds' own ratios, in which drift cancels."""
    return median(theirs / ours for ours, theirs in zip(variant.seconds, baseline.seconds, strict=True))
