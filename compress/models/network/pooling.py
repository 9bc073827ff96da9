"""From a batch to vectors by a network alone: what calibration and training run, where an embedder's loop would be in the way."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.network.nv_embed import NVEmbedNetwork
from compress.models.network.segments import backbone_of
from compress.models.text.spec import EmbedderSpec, Pooling


def pooled_vectors(
    network: nn.Module, spec: EmbedderSpec, hidden: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """Turn hidden states into vectors.

    Args:
        network: the one that they come from; of NV-Embed's the head is run.
        spec: how other networks' tokens are pooled.
        hidden: [texts, length, width], behind the final norm.
        mask: int64 [texts, length], 1 for tokens.
        pooled: the same, 1 for tokens that enter a mean.

    Returns:
        float32 [texts, dimension].
    """
    if isinstance(network, NVEmbedNetwork):
        return network.pool(hidden, pooled)
    return pool(hidden, pooled if spec.pooling is Pooling.MEAN else mask, spec)


def vectors_of(network: nn.Module, spec: EmbedderSpec, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """Embed a padded batch, int64 [texts, length] three times: float32 [texts, dimension]; gradients flow."""
    hidden = backbone_of(network)(input_ids=ids, attention_mask=mask).last_hidden_state
    return pooled_vectors(network, spec, hidden, mask, pooled)


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


class TextNetwork(nn.Module):
    """From token ids to vectors."""

    def __init__(self, network: nn.Module, spec: EmbedderSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed a batch: int64 [texts, length] each to float32 [texts, dimension]; `pool_mask`, where given: what is pooled."""
        pooled = attention_mask if pool_mask is None else pool_mask
        hidden = backbone_of(self.network)(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if isinstance(self.network, NVEmbedNetwork):
            return self.network.pool_padded(hidden, pooled)
        return pool(hidden, pooled, self.spec)
