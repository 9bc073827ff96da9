"""What an operator sees: Prometheus metrics, and one JSON line for each request. No text of a client is in either."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO, TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from compress.serve.scheduling import Dispatch

if TYPE_CHECKING:
    from compress.serve.model import ServedModel

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
BATCH_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass
class Noted:
    """What is known of a request when it is answered."""

    id: str
    method: str
    path: str
    status: int = 0
    model: str | None = None
    prompt: str | None = None
    items: int = 0
    tokens: int = 0
    bytes: int = 0
    queue_ms: float | None = None
    compute_ms: float | None = None
    total_ms: float = 0.0
    error: str | None = None
    """The code or type of the error; never its message, which may quote the request."""


class Telemetry:
    """The metrics of a server and its log."""

    def __init__(self, log: IO[str] | None = None) -> None:
        """Make the metrics; `log`: where lines go, None for standard output."""
        self._log = log or sys.stdout
        self.registry = CollectorRegistry()
        made = self.registry
        self.requests = Counter("compress_requests", "Requests answered.", ["model", "path", "status"], registry=made)
        self.seconds = Histogram("compress_request_seconds", "Time to answer.", ["model"], buckets=SECONDS, registry=made)
        self.queue = Histogram("compress_queue_seconds", "Time until computing began.", ["model"], buckets=SECONDS, registry=made)
        self.compute = Histogram("compress_compute_seconds", "Time of a dispatch.", ["model"], buckets=SECONDS, registry=made)
        self.fill = Histogram("compress_batch_fill", "Share that is no padding.", ["model"], buckets=SHARES, registry=made)
        self.batch = Histogram("compress_dispatch_texts", "Texts computed together.", ["model"], buckets=BATCH_TEXTS, registry=made)
        self.tokens = Counter("compress_tokens", "Tokens embedded.", ["model"], registry=made)
        self.texts = Counter("compress_texts", "Texts embedded.", ["model"], registry=made)
        self.restarts = Counter("compress_process_restarts", "Computing processes started anew.", ["model"], registry=made)
        self.waiting = Gauge("compress_waiting_tokens", "Tokens that wait or are computed.", ["model"], registry=made)
        self.processes = Gauge("compress_ready_processes", "Computing processes that take texts.", ["model"], registry=made)
        self.bodies = Gauge("compress_open_body_bytes", "Bytes of requests that are not answered.", registry=made)

    def line(self, event: dict[str, Any]) -> None:
        """Write a line of the log."""
        self._log.write(json.dumps({"time": round(time.time(), 3), **event}) + "\n")
        self._log.flush()

    def answered(self, noted: Noted) -> None:
        """Take note of a request that was answered."""
        model = noted.model or ""
        self.requests.labels(model, noted.path, str(noted.status)).inc()
        if noted.model is not None:
            self.seconds.labels(model).observe(noted.total_ms / 1000)
            if noted.queue_ms is not None:
                self.queue.labels(model).observe(noted.queue_ms / 1000)
        self.line({key: value for key, value in asdict(noted).items() if value not in (None, 0, "")})

    def exposition(self, models: Iterable[ServedModel]) -> bytes:
        """Return all metrics as Prometheus reads them."""
        for model in models:
            self.waiting.labels(model.name).set(model.scheduler.tokens)
            self.processes.labels(model.name).set(sum(instance.ready.is_set() for instance in model.instances))
        return bytes(generate_latest(self.registry))


class Watched:
    """Notes what the processes of a model do."""

    def __init__(self, telemetry: Telemetry, model: str) -> None:
        """Note it under a model's name."""
        self._telemetry, self._model = telemetry, model

    def computed(self, dispatch: Dispatch, seconds: float, padded: int) -> None:
        """Take note of a finished dispatch."""
        told, tokens = self._telemetry, sum(dispatch.lengths)
        told.compute.labels(self._model).observe(seconds)
        told.fill.labels(self._model).observe(tokens / padded if padded else 1.0)
        told.batch.labels(self._model).observe(len(dispatch.texts))
        told.tokens.labels(self._model).inc(tokens)
        told.texts.labels(self._model).inc(len(dispatch.texts))

    def restarted(self, why: str) -> None:
        """Take note of a process that ended and is started anew."""
        self._telemetry.restarts.labels(self._model).inc()
        self._telemetry.line({"event": "process ended", "model": self._model, "why": why})
