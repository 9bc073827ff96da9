"""An embedder that never holds its model: every call reads the blocks one after another and takes all its texts through each."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from compress.common.cache import cache_root
from compress.models.embedder import BatchedEmbedder, Vectors
from compress.models.network.segments import Kind, Parts, Segment, replaced
from compress.models.network.walk import Carry, Streamed, walk
from compress.models.text.tokens import Batch
from compress.runtimes.torch_embedder import TorchEmbedder

# Hidden states beyond this lie in files.
HIDDEN_BYTES = 2 * 10**9


class StreamedEmbedder(BatchedEmbedder):
    """Encodes in the memory of one block and the texts' hidden states; the vectors are those of the whole model, bit for bit.

    Reading the weights takes its time in every call, so give it all texts at once.
    """

    def __init__(self, embedder: TorchEmbedder, source: Streamed, hidden_bytes: int = HIDDEN_BYTES) -> None:
        """Take the embedder that the model would be if it were loaded (its network has no values), and where its weights are."""
        super().__init__(embedder.name, embedder.spec, embedder.tokenizer, embedder.dimension, embedder.batch_tokens)
        self._embedder = embedder
        self._source = source
        self._hidden_bytes = hidden_bytes

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        needed = sum(ids.size for ids, _ in batches) * self.dimension * self._embedder.dtype.itemsize
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
