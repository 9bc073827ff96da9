"""An embedder whose network is a torch module from transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from compress.models.embedder import Batch, BatchedEmbedder, Vectors, watched
from compress.models.spec import EmbedderSpec, Pooling
from compress.models.tokens import TextTokenizer

# Padded tokens a batch holds unless told otherwise. On a CPU, what a batch of 1,024 tokens touches stays in the cache; a GPU needs
# many more to be busy (measured for MiniLM on two cores: 1,024 tokens 1.1 to 1.7 times as fast as 4,096).
BATCH_TOKENS = {"cpu": 1_024}
BATCH_TOKENS_ELSEWHERE = 16_384


def pool(hidden: torch.Tensor, mask: torch.Tensor, spec: EmbedderSpec, pool_from: int = 0) -> torch.Tensor:
    """Pool token vectors into text vectors, in float32.

    Args:
        hidden: [batch, length, width], any floating dtype.
        mask: int64 [batch, length], 1 for tokens, 0 for padding on the right.
        spec: says how, and whether to normalise to unit length.
        pool_from: the mean leaves out the tokens before this position.

    Returns:
        float32 [batch, width].
    """
    if spec.pooling is Pooling.CLS:
        pooled = hidden[:, 0].float()
    elif spec.pooling is Pooling.LAST:
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1).clamp_min(1) - 1].float()
    else:
        weights = mask.to(torch.float32)
        if pool_from:
            weights = weights * (torch.arange(mask.shape[1], device=mask.device) >= pool_from)
        # A product of [1, length] with [length, width]: no masked copy of the hidden states.
        pooled = (weights.unsqueeze(1) @ hidden.float()).squeeze(1) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)
    return nn.functional.normalize(pooled, dim=1) if spec.normalize else pooled


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
        batch_tokens = BATCH_TOKENS.get(device.type, BATCH_TOKENS_ELSEWHERE)
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
