"""Throughput, latency and memory: every embedder in a fresh process, all of them in turn within each round."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict


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
    threads: int
    loaded_bytes: int | None
    """Anonymous memory above the process's imports once the model is ready; None where the kernel does not tell."""
    peak_bytes: int | None
    """The same, at its peak while encoding."""
    gpu_peak_bytes: int | None


@dataclass(frozen=True)
class Candidate:
    """An embedder to measure: `loader` ("module:function") is called with `arguments` in the fresh process."""

    arguments: Mapping[str, Any]
    loader: str = "compress.loading:load"
    environment: Mapping[str, str] = field(default_factory=dict)


class WorkerProcess:
    """A running `compress.measure.worker`."""

    def __init__(self, candidate: Candidate, threads: int | None) -> None:
        environment = {**os.environ, **candidate.environment}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compress.measure.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
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
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            printed = self._process.stderr.read()
            raise RuntimeError(f"the measuring process ended with code {self._process.wait()}:\n{printed[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

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
) -> dict[str, Speed]:
    """Measure candidates on the same texts, interleaved: A B C, A B C, ... so that a drifting machine drifts for all.

    All processes are loaded before the first round and only one works at a time. One uncounted pass over the texts warms each.
    """
    texts = list(texts)
    singles = [texts[index % len(texts)] for index in range(requests)]
    workers: dict[str, WorkerProcess] = {}
    try:
        for name, candidate in candidates.items():
            workers[name] = WorkerProcess(candidate, threads)
            workers[name].ask("throughput", texts=texts, batch_tokens=batch_tokens)
        tokens = next(iter(workers.values())).ask("count", texts=texts)["tokens"]
        passes: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(rounds):
            for name, worker in workers.items():
                passes[name].append(worker.ask("throughput", texts=texts, batch_tokens=batch_tokens))
        latencies = {name: worker.ask("latency", texts=singles)["seconds"] for name, worker in workers.items()}
        return {
            name: _summary(passes[name], latencies[name], len(texts), tokens, worker.loaded) for name, worker in workers.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def _summary(
    passes: Sequence[Mapping[str, Any]], latencies: Sequence[float], texts: int, tokens: int, loaded: Mapping[str, Any]
) -> Speed:
    seconds = [one["seconds"] for one in passes]
    peaks = [one["peak_bytes"] for one in passes if one["peak_bytes"] is not None]
    gpu_peaks = [one["gpu_peak_bytes"] for one in passes if one["gpu_peak_bytes"] is not None]
    return Speed(
        texts_per_second=texts / median(seconds),
        tokens_per_second=tokens / median(seconds),
        seconds=tuple(seconds),
        latency_p50_ms=float(np.percentile(latencies, 50)) * 1e3,
        latency_p99_ms=float(np.percentile(latencies, 99)) * 1e3,
        threads=loaded["threads"],
        loaded_bytes=loaded["loaded_bytes"],
        peak_bytes=max(peaks, default=None),
        gpu_peak_bytes=max(gpu_peaks, default=None),
    )


def speed_ratio(variant: Speed, baseline: Speed) -> float:
    """Return how many times as fast `variant` is: the median of the rounds' own ratios, in which drift cancels."""
    return median(theirs / ours for ours, theirs in zip(variant.seconds, baseline.seconds, strict=True))
