"""From a batch to vectors by a network alone: what calibration and training run, where an embedder's loop would be in the way."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.nv_embed import NVEmbedNetwork
from compress.models.segments import backbone_of
from compress.models.spec import EmbedderSpec, Pooling
from compress.models.torch_embedder import pool


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
