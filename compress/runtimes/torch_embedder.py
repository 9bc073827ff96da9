"""An embedder whose network is a torch module from transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress.models.embedder import BatchedEmbedder, Vectors, watched
from compress.models.network.nv_embed import NVEmbedNetwork
from compress.models.network.pooling import pool
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Batch, TextTokenizer
from compress.runtimes.contract import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS


class TorchEmbedder(BatchedEmbedder):
    """A transformers encoder or decoder, pooled."""

    def __init__(
        self,
        name: str,
        spec: EmbedderSpec,
        tokenizer: TextTokenizer,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Wrap `model` (a transformers base model whose output has `last_hidden_state`), already on `device`."""
        batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
        super().__init__(name, spec, tokenizer, int(model.config.hidden_size), batch_tokens)  # type: ignore[union-attr, arg-type]
        self.model = model.eval()
        self.device = device
        self.dtype = dtype

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        for ids, mask in watched(batches, "encoding", show):
            yield self._embed(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), pool_from)

    @torch.inference_mode()
    def _embed(self, ids: torch.Tensor, mask: torch.Tensor, pool_from: int) -> Vectors:
        vectors: Vectors = self.pool(self.hidden(ids, mask), mask, pool_from).cpu().numpy()
        return vectors

    @property
    def threads(self) -> int:
        """How many CPU threads compute."""
        return torch.get_num_threads()

    def compile(self) -> None:
        """Run the network through `torch.compile` from now on."""
        self.model = torch.compile(self.model, dynamic=True)  # type: ignore[assignment]

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the transformer: int64 [batch, length] twice to [batch, length, width]."""
        hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor, pool_from: int) -> torch.Tensor:
        """Turn hidden states into vectors: float32 [batch, dimension]."""
        return pool(hidden, mask, self.spec, pool_from)


class NVEmbedder(TorchEmbedder):
    """NV-Embed as an embedder."""

    model: NVEmbedNetwork

    def compile(self) -> None:
        """Run the backbone through `torch.compile` from now on; the head is a few products."""
        self.model.embedding_model = torch.compile(self.model.embedding_model, dynamic=True)  # type: ignore[assignment]

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the backbone; see `TorchEmbedder.hidden`."""
        hidden: torch.Tensor = self.model.embedding_model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor, pool_from: int) -> torch.Tensor:
        """Run the head on the tokens from `pool_from` on; see `TorchEmbedder.pool`."""
        pool_mask = mask.clone()
        pool_mask[:, :pool_from] = 0
        return self.model.pool(hidden, pool_mask)
