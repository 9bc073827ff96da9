"""What is measured on a GPU, with a stand-in for torch's module: waiting, events, warm-up, the card; old records stay readable."""

from __future__ import annotations

import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compress.common.card import Card, parsed, read_card
from compress.measure.speed.timing import Speed, _Times
from compress.measure.speed.worker import Worker
from compress.reports.terminal import _on_card

LISTING = "NVIDIA H100 80GB HBM3, 570.86.15, 1755, 2619, 1980, 41, 312.50\n"
CARD = Card(
    name="NVIDIA H100 80GB HBM3", driver="570.86.15", clock_mhz=1755, memory_clock_mhz=2619, most_clock_mhz=1980, celsius=41,
    watts=312.5,
)  # fmt: skip


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a `nvidia-smi` first in the path."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


class Gpu:
    """Writes down what is asked of `torch.cuda`."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def synchronize(self) -> None:
        self.log.append("wait")

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        return SimpleNamespace(record=lambda: self.log.append("event"), elapsed_time=lambda other: 250.0)

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(uuid="1234", name="a card")


class Embedder:
    """Writes down its calls next to the GPU's."""

    batch_tokens, batching, small_requests = 512, "packed", "CUDA graphs of up to 32 tokens"

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def encode(self, texts: list[str], batch_tokens: int | None = None) -> np.ndarray:
        self.log.append(f"encode {len(texts)}")
        return np.zeros((len(texts), 2))

    def tokenizer(self, texts: list[str]) -> list[np.ndarray]:
        self.log.append("tokenize")
        return [np.arange(3)] * len(texts)

    def embed(self, rows: list[np.ndarray], budget: int, pool_from: int, show: bool) -> np.ndarray:
        self.log.append(f"embed {len(rows)} by {budget}")
        return np.zeros((len(rows), 2))


def worker(gpu: Gpu | None, log: list[str]) -> Worker:
    made = Worker()
    made.gpu, made.embedder = gpu, Embedder(log)
    return made


def test_a_round_waits_for_the_gpu_and_is_timed_again_without_tokenizing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, f'[ "$3" = "--id=GPU-1234" ] && printf "{LISTING.strip()}"')
    gpu = Gpu()
    answer = worker(gpu, gpu.log).throughput(["a", "b"], None)
    assert gpu.log == ["wait", "encode 2", "wait", "tokenize", "wait", "event", "embed 2 by 512", "event", "wait"]
    assert answer["ids_seconds"] == 0.25
    assert answer["card"] == CARD.model_dump()


def test_single_texts_are_warmed_up_on_a_gpu_only() -> None:
    gpu, log = Gpu(), []
    assert len(worker(gpu, gpu.log).latency(["a", "b"])["seconds"]) == 2
    assert gpu.log == ["encode 1", "encode 1", *["wait", "encode 1", "wait"] * 2]
    assert len(worker(None, log).latency(["a", "b"])["seconds"]) == 2
    assert log == ["encode 1", "encode 1"]


def test_without_a_gpu_nothing_is_said_of_one() -> None:
    log: list[str] = []
    answer = worker(None, log).throughput(["a"], None)
    assert (answer["ids_seconds"], answer["card"]) == (None, None)
    assert log == ["encode 1"]
    assert worker(None, log).ways() == {"batching": "packed", "small_requests": None}
    assert worker(Gpu(), log).ways() == {"batching": "packed", "small_requests": "CUDA graphs of up to 32 tokens"}


def test_the_driver_s_listing_is_read() -> None:
    assert parsed(LISTING) == CARD
    lacking = parsed("Tesla T4, 535.1, [N/A], [Not Supported], 1590, 50, [N/A]\n")
    assert lacking == Card(name="Tesla T4", driver="535.1", most_clock_mhz=1590, celsius=50)
    assert parsed("") is parsed("No devices were found\n") is None


def test_a_card_is_asked_of_the_driver_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_card() is None  # no such command
    install(tmp_path, monkeypatch, f'printf "{LISTING.strip()}"')
    assert read_card() == CARD
    install(tmp_path, monkeypatch, "echo failed; exit 9")
    assert read_card() is None
    assert worker(Gpu(), []).throughput(["a"], None)["card"]["name"] == "a card"


def test_rounds_are_kept_and_old_records_have_none() -> None:
    times = _Times()
    for seconds in (1.0, 3.0, 2.0):
        times.add({"seconds": seconds, "ids_seconds": 0.9 * seconds, "card": CARD.model_dump()})
    times.latencies += [0.01, 0.02]
    memory = {"threads": 1, "loaded_bytes": None, "peak_bytes": None, "gpu_peak_bytes": 7}
    speed = times.speed(10, 100, **memory, batching="packed", small_requests="as it is")
    assert speed.ids_seconds == pytest.approx((0.9, 2.7, 1.8))
    assert speed.cards == (CARD,) * 3
    assert Speed(**speed.model_dump()) == speed  # as the run's journal keeps it
    said = _on_card("variant", speed)
    assert "packed batches" in said
    assert "1755 to 1755 MHz of 1980" in said
    assert "90%" in said
    old = {
        name: value
        for name, value in speed.model_dump().items()
        if name not in ("batching", "small_requests", "ids_seconds", "cards")
    }
    assert Speed(**old).cards == Speed(**old).ids_seconds == ()
    assert Speed(**old).batching is None
