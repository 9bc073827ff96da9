"""An embedder whose network is a lowered graph. No torch and no transformers here or in the runtimes that build on it."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compress.common.errors import UserError
from compress.models.embedder import BatchedEmbedder, Vectors, with_progress
from compress.models.files.headers import weight_bytes
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Batch, Ids
from compress.runtimes.allocator import keep_freed_memory
from compress.runtimes.contract import graph_file, pick_runtime

# What a batch of 768 padded tokens touches stays in the caches of two cores (MiniLM, two streams: 512 to 1,024 tokens within 3 %
# of each other, 2,048 a tenth slower).
BATCH_TOKENS = 768
# From this size on a product keeps all cores busy by itself, and a batch of its own in each core's caches is too much.
LARGE_BYTES = 500 * 10**6


class GraphEmbedder(BatchedEmbedder):
    """Runs batches side by side, one in each stream; `encode` may be called by many threads at once."""

    def __init__(self, folder: ModelFolder, threads: int, streams: int) -> None:
        """Take the variant's folder; the subclass has built what runs, so that `dimension` is known."""
        super().__init__(folder.name, folder.spec, folder.tokenizer, self._dimension(), BATCH_TOKENS)
        self.threads = threads
        self._streams = ThreadPoolExecutor(streams, thread_name_prefix="stream")

    @abstractmethod
    def _dimension(self) -> int:
        """Return the width of the graph's vectors."""

    @abstractmethod
    def run(self, inputs: Sequence[Ids]) -> Vectors:
        """Run one batch in the calling thread: the graph's inputs, int64 [texts, length] each, to float32 [texts, dimension]."""

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""

        def one(batch: Batch) -> Vectors:
            return self.run(batch if self.spec.pool_prompt else (*batch, _pooled(batch[1], pool_from)))

        if len(batches) == 1:
            yield one(batches[0])
            return
        running = [self._streams.submit(one, batch) for batch in batches]
        try:
            for future in with_progress(running, "encoding", show):
                yield future.result()
        finally:
            for future in running:
                future.cancel()  # where one has failed or the caller has gone


def _pooled(mask: Ids, pool_from: int) -> Ids:
    pooled = mask.copy()
    pooled[:, :pool_from] = 0
    return pooled


def threads_and_streams(folder: ModelFolder, threads: int | None) -> tuple[int, int]:
    """Return how many threads compute and in how many streams: a stream a thread, but one for all where the model is large."""
    keep_freed_memory()
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads, 1 if weight_bytes(folder.path) > LARGE_BYTES else threads


def lowered(folder: ModelFolder, runtime: str, dtype: str | None = None) -> Path:
    """Return the graph of a variant for a runtime; where it is not there, another process writes it, because that needs torch.

    Raises:
        UserError: the runtime does not execute the variant's numbers or the dtype, or the graph could not be written.
    """
    pick_runtime(runtime, folder.compressed.quantized, dtype=dtype)
    path = graph_file(folder.path, runtime)
    if not path.exists():
        command = [sys.executable, "-m", "compress.runtimes.lower", str(folder.path), runtime]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{folder.path}: could not be lowered for {runtime}", said[-1])
    return path
