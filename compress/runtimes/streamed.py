"""An embedder that streams its model: each call reads the blocks one after another and runs all its texts through each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from compress.common.cache import cache_root
from compress.models.embedder import BatchedEmbedder, Vectors
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, Segment, replaced
from compress.models.network.walk import Carry, Streamed, walk
from compress.models.text.tokens import Batch
from compress.runtimes.torch_embedder import TorchEmbedder

# Size up to which hidden states are kept in memory. Larger ones are kept in files.
HIDDEN_BYTES = 2 * 10**9


class StreamedEmbedder(BatchedEmbedder):
    """Embeds texts in the memory of one block plus their hidden states. The vectors equal those of the loaded model, bit for bit.

    Each call reads all weights, so it is best to pass all texts in one call. Batches are padded, on a GPU too: the walk over
    segments keeps the hidden states of padded batches, and reading the weights takes longer than the padding.
    """

    def __init__(self, embedder: TorchEmbedder, source: Streamed, hidden_bytes: int = HIDDEN_BYTES) -> None:
        """Combine an embedder with the source of its weights.

        Args:
            embedder: the embedder around an empty network, with its parameters on the meta device.
            source: the source of the network's segments.
            hidden_bytes: size in bytes up to which hidden states are kept in memory; larger ones are kept in files.
        """
        super().__init__(embedder.name, embedder.spec, embedder.tokenizer, embedder.dimension, embedder.batch_tokens)
        self._embedder = embedder
        self._source = source
        self._hidden_bytes = hidden_bytes

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        item = self._embedder.dtype.itemsize
        if head_of(self._embedder.model).layers is not None:
            item += torch.float32.itemsize  # for the sum of the blocks' outputs
        needed = sum(ids.size for ids, _ in batches) * self.dimension * item
        if needed <= self._hidden_bytes:
            yield from self._walked(batches, pool_from, None)
            return
        root = cache_root()
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="hidden-", dir=root) as folder:
            yield from self._walked(batches, pool_from, Path(folder))

    def _walked(self, batches: Sequence[Batch], pool_from: int, folder: Path | None) -> list[Vectors]:
        embedder, head = self._embedder, Parts()
        carry = Carry(batches, embedder.device, folder)

        def keep_head(_: int, segment: Segment, parts: Parts) -> None:
            if segment.kind is Kind.HEAD:
                head.update(parts)

        with torch.inference_mode():
            walk(self._source, keep_head, carry)
            with replaced(embedder.model, head):
                masks = (torch.from_numpy(mask).to(embedder.device) for _, mask in batches)
                return [embedder.pool(carry.hidden(index), mask, pool_from).cpu().numpy() for index, mask in enumerate(masks)]
