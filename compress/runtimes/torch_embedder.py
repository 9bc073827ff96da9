"""An embedder that runs a network in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress.models.embedder import BatchedEmbedder, Vectors, with_progress
from compress.models.folder import ModelFolder
from compress.models.network.pooling import backbone_of, head_of, hidden_of
from compress.models.text.tokens import Batch
from compress.runtimes.contract import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS


class TorchEmbedder(BatchedEmbedder):
    """An embedder that runs a network and its head in torch."""

    def __init__(self, folder: ModelFolder, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        """Wrap a network.

        Args:
            folder: the model's folder, which says how the model takes texts.
            model: the network, which must be on `device` already.
            device: the device on which it runs.
            dtype: its compute dtype.
        """
        batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
        super().__init__(folder.name, folder.spec, folder.tokenizer, folder.dimension, batch_tokens)
        self.model = model.eval()
        self.device = device
        self.dtype = dtype

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        for ids, mask in with_progress(batches, "encoding", show):
            yield self._embed(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), pool_from)

    @torch.inference_mode()
    def _embed(self, ids: torch.Tensor, mask: torch.Tensor, pool_from: int) -> Vectors:
        vectors: Vectors = self.pool(self.hidden(ids, mask), mask, pool_from).cpu().numpy()
        return vectors

    @property
    def threads(self) -> int:
        """Number of CPU threads that compute."""
        return torch.get_num_threads()

    def compile(self) -> None:
        """Run the backbone through `torch.compile` from now on. The head is not compiled; it is only a few operations."""
        backbone_of(self.model).compile(dynamic=True)

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the backbone: ids and mask, int64 [texts, length], to what the head is given, [texts, length, width]."""
        return hidden_of(self.model, ids, mask)

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor, pool_from: int) -> torch.Tensor:
        """Run the head.

        Args:
            hidden: hidden states, [texts, length, width].
            mask: int64 [texts, length], 1 for tokens.
            pool_from: position of the first token to pool.

        Returns:
            float32 [texts, dimension].
        """
        pooled = mask
        if pool_from:
            pooled = mask.clone()
            pooled[:, :pool_from] = 0
        vectors: torch.Tensor = head_of(self.model)(hidden, mask, pooled)
        return vectors
