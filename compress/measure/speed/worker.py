"""A process that holds one embedder and measures it on request: JSON lines in, JSON lines out.

Each embedder gets a fresh process, so that its memory can be told from everything else. `compress.measure.speed.timing` starts it
(`python -m compress.measure.speed.worker`); it is not meant to be run by hand.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

from compress.common.card import Card, read_card
from compress.common.memory import PeakAnonymous, anonymous_bytes, release_free_pages


class Worker:
    """Answers requests about one embedder."""

    def __init__(self) -> None:
        self.embedder: Any = None
        self.imports_bytes: int | None = None
        self.gpu: Any = None
        """torch's module for GPUs, if the embedder may use one."""
        self._warm: set[tuple[int, int]] = set()

    def load(self, loader: str, arguments: dict[str, Any], threads: int | None) -> dict[str, Any]:
        """Load the embedder by calling `loader` ("module:function") with `arguments`; return the memory that it takes."""
        module = importlib.import_module(loader.partition(":")[0])
        # Memory is counted from after the imports, which are not part of the model.
        if hasattr(module, "preload"):
            module.preload(**arguments)
        load = getattr(module, loader.partition(":")[2])
        torch: Any = sys.modules.get("torch")  # not imported here: a runtime without torch is measured without torch
        on_gpu = arguments.get("device") != "cpu" and torch and torch.cuda.is_available()
        self.gpu = torch.cuda if on_gpu else None
        release_free_pages()
        self.imports_bytes = anonymous_bytes()
        self.embedder = load(**arguments, **({"threads": threads} if threads else {}))
        release_free_pages()
        return {"loaded_bytes": self._above_imports(anonymous_bytes()), "threads": getattr(self.embedder, "threads", None)}

    def memory(self, texts: list[str], batch_tokens: int | None) -> dict[str, Any]:
        """Encode all texts once and watch the memory. This pass is not timed, because watching uses a share of a core."""
        if self.gpu:
            self.gpu.reset_peak_memory_stats()
        with PeakAnonymous() as peak:
            self.embedder.encode(texts, batch_tokens=batch_tokens)
        gpu_bytes = self.gpu.max_memory_allocated() if self.gpu else None
        return {"peak_bytes": self._above_imports(peak.bytes), "gpu_peak_bytes": gpu_bytes}

    def throughput(self, texts: list[str], batch_tokens: int | None) -> dict[str, Any]:
        """Encode all texts once; return the seconds and, on a GPU, those from token ids to vectors and the card's state."""
        seconds = self._timed(texts, batch_tokens)
        return {"seconds": seconds, "ids_seconds": self._ids_seconds(texts, batch_tokens), "card": self._card()}

    def _timed(self, texts: list[str], batch_tokens: int | None) -> float:
        """Encode texts; return the seconds until the GPU, if there is one, has nothing left to do."""
        self._synchronize()
        start = time.perf_counter()
        self.embedder.encode(texts, batch_tokens=batch_tokens)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.gpu:
            self.gpu.synchronize()

    def _ids_seconds(self, texts: list[str], batch_tokens: int | None) -> float | None:
        """Return the seconds from token ids to vectors between two events of the GPU; None without a GPU, or for a Router."""
        if not self.gpu or not hasattr(self.embedder, "embed"):
            return None
        rows = self.embedder.tokenizer(texts)
        begin, end = (self.gpu.Event(enable_timing=True) for _ in range(2))
        self._synchronize()
        begin.record()
        self.embedder.embed(rows, batch_tokens or self.embedder.batch_tokens, 0, False)
        end.record()
        self._synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def _card(self) -> dict[str, Any] | None:
        """Return the state of the GPU that torch uses; None without one. It is asked for right after work, while clocks are up."""
        if not self.gpu:
            return None
        properties = self.gpu.get_device_properties(self.gpu.current_device())
        uuid = getattr(properties, "uuid", None)
        card = read_card(None if uuid is None else f"GPU-{uuid}") or Card(name=properties.name)
        return card.model_dump()

    def ways(self) -> dict[str, Any]:
        """Return how the embedder ran: padded or packed and, on a GPU, what ran single texts."""
        small = getattr(self.embedder, "small_requests", None) if self.gpu else None
        return {"batching": getattr(self.embedder, "batching", None), "small_requests": small}

    def latency(self, texts: list[str]) -> dict[str, Any]:
        """Encode the texts one at a time; return the seconds of each. On a GPU, each was encoded once before, untimed.

        The first text of a length makes a GPU choose kernels and record graphs, which a server does once.
        """
        for text in texts if self.gpu else ():
            self.embedder.encode([text])
        return {"seconds": [self._timed([text], None) for text in texts]}

    def cell(self, batch: int, length: int) -> dict[str, Any]:
        """Encode a batch of texts of `length` tokens, special tokens included; return the seconds, None if such texts are cut."""
        text = self._text_of(length)
        if text is None:
            return {"seconds": None}
        budget = batch * length  # exactly one batch
        if (batch, length) not in self._warm:
            self.embedder.encode([text] * batch, batch_tokens=budget)
            self._warm.add((batch, length))
        return {"seconds": self._timed([text] * batch, budget)}

    def _text_of(self, length: int) -> str | None:
        """Return a text of that many tokens; None if the embedder truncates texts before that."""

        def tokens(words: int) -> int:
            return len(self.embedder.tokenizer([" ".join(["a"] * words)])[0])

        words = length - tokens(0)
        return " ".join(["a"] * words) if words > 0 and tokens(words) == length else None

    def count(self, texts: list[str]) -> dict[str, Any]:
        """Count the tokens of all texts after truncation, special tokens included."""
        return {"tokens": sum(len(row) for row in self.embedder.tokenizer(texts))}

    def _above_imports(self, total: int | None) -> int | None:
        return None if total is None or self.imports_bytes is None else total - self.imports_bytes


def main() -> None:
    """Serve requests until standard input closes."""
    # Libraries may print. Answers go to the original standard output, everything else to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(worker, request.pop("do"))(**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
