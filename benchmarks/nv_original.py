"""NV-Embed's head as the published code runs it, for comparison: on every padded token, with keys and values for every text."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from compress.models.network.nv_embed import LatentAttention, NVEmbedNetwork


def original_head(head: LatentAttention, hidden: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
    """Pool hidden states [b, length, width] by a mask, int64 [b, length], to float32 [b, width]."""
    attend, feed = head.cross_attend_blocks
    attention = attend.fn
    texts = hidden.shape[0]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.view(texts, x.shape[1], attention.heads, attention.head_width).transpose(1, 2)

    context = attend.norm_context(head.latents.expand(texts, -1, -1))
    key, value = attention.to_kv(context).chunk(2, dim=-1)
    mixed = F.scaled_dot_product_attention(split(attention.to_q(attend.norm(hidden))), split(key), split(value))
    hidden = hidden + attention.to_out(mixed.transpose(1, 2).flatten(2))
    hidden = hidden + feed.fn.net(feed.norm(hidden))
    sums = torch.einsum("blw,bl->bw", hidden, pool_mask.to(hidden.dtype)).float()
    return sums / pool_mask.sum(dim=1, keepdim=True)


class OriginalStyle(nn.Module):
    """Backbone and head; every padded token goes through both."""

    def __init__(self, network: NVEmbedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None, pool_mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch: int64 [b, length] three times (no mask: no padding) to float32 [b, width], unit norm."""
        hidden = self.network.embedding_model(input_ids=ids, attention_mask=mask).last_hidden_state
        head = self.network.latent_attention_model
        assert isinstance(head, LatentAttention)
        return F.normalize(original_head(head, hidden, pool_mask), dim=1)
