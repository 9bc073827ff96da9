"""An embedder that runs a lowered graph. No torch or transformers here, nor in the runtimes that build on it."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compress.common.children import tied
from compress.common.errors import UserError
from compress.models.embedder import BatchedEmbedder, Vectors, with_progress
from compress.models.files.headers import weight_bytes
from compress.models.folder import ModelFolder
from compress.models.text.tokens import Batch, Ids
from compress.runtimes.allocator import keep_freed_memory
from compress.runtimes.contract import Kind, graph_file, pick_runtime

# Padded tokens in a batch. The data of such a batch stays in the caches of two cores. Measured with MiniLM in two streams: 512 to
# 1,024 tokens are within 3 % of each other, 2,048 tokens are a tenth slower.
BATCH_TOKENS = 768
# From this size of the weights on, one matrix product keeps all cores busy, and separate batches per core do not fit in the caches.
LARGE_BYTES = 500 * 10**6


class GraphEmbedder(BatchedEmbedder):
    """Runs batches in parallel, one per stream. Several threads may call `encode` at once."""

    def __init__(self, folder: ModelFolder, threads: int, streams: int) -> None:
        """Set up the streams. A subclass must open its graph first, because `_dimension` is read from it.

        Args:
            folder: the variant's folder.
            threads: number of CPU threads that compute.
            streams: number of batches that run in parallel.
        """
        super().__init__(folder.name, folder.spec, folder.tokenizer, self._dimension(), BATCH_TOKENS)
        self.threads = threads
        self._streams = ThreadPoolExecutor(streams, thread_name_prefix="stream")

    @abstractmethod
    def _dimension(self) -> int:
        """Return the width of the graph's vectors."""

    @abstractmethod
    def run(self, inputs: Sequence[Ids]) -> Vectors:
        """Run one batch in the calling thread.

        Args:
            inputs: the graph's inputs (`contract.INPUTS`), each int64 [texts, length].

        Returns:
            float32 [texts, dimension].
        """

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""

        def one(batch: Batch) -> Vectors:
            return self.run(batch if self.spec.pool_prompt else (*batch, pooled_from(batch[1], pool_from)))

        if len(batches) == 1:
            yield one(batches[0])
            return
        running = [self._streams.submit(one, batch) for batch in batches]
        try:
            for future in with_progress(running, "encoding", show):
                yield future.result()
        finally:
            for future in running:
                future.cancel()  # has an effect if a batch failed or the caller stopped early


def pooled_from(mask: Ids, pool_from: int) -> Ids:
    """Return a mask, int64 [texts, length], without the tokens before a position, which are a prompt that is not pooled."""
    pooled = mask.copy()
    pooled[:, :pool_from] = 0
    return pooled


def threads_and_streams(folder: ModelFolder, threads: int | None) -> tuple[int, int]:
    """Return the numbers of threads and streams: one stream per thread, or a single stream for all threads if the model is large.

    Args:
        folder: the variant's folder.
        threads: number of CPU threads; None for one per core that the process may use.
    """
    keep_freed_memory()
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads, 1 if weight_bytes(folder.path) > LARGE_BYTES else threads


def lowered(folder: ModelFolder, runtime: str, dtype: str | None = None) -> Path:
    """Return the path of a variant's graph for a runtime. If there is none yet, another process writes it, which needs torch.

    Args:
        folder: the variant's folder.
        runtime: name of the runtime.
        dtype: dtype of the floating-point arithmetic; None for the runtime's default.

    Raises:
        UserError: the runtime does not support the variant's number formats or the dtype, or the graph could not be written.
    """
    pick_runtime(runtime, folder.compressed.quantized, dtype=dtype, kind=Kind(static=folder.is_static))
    path = graph_file(folder.path, runtime)
    if not path.exists():
        command = [sys.executable, "-m", "compress.runtimes.lower", str(folder.path), runtime]
        done = subprocess.run(tied(command), capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"{folder.path}: could not be lowered for {runtime}", said[-1])
    return path
