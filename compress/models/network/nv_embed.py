"""NV-Embed: Mistral without a causal mask, latent-attention pooling; and the same head folded to a fifteenth of its size.

Lee et al. 2024, "NV-Embed", arXiv 2405.17428, section 3. Module names are those of the published checkpoint
(nvidia/NV-Embed-v2), so its tensors load by name. Checked against outputs of the original code: tests/models/test_nv_embed.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel

from compress.models.folder import ModelFolder
from compress.models.network.pooling import TextHead, vectors_of
from compress.models.text.nv_embed import latent_settings

FEED_FORWARD_FACTOR = 4

Mean = Callable[[torch.Tensor], torch.Tensor]
"""Averages the rows of each text in float32: [n, any] to [texts, any]."""


class CrossAttention(nn.Module):
    """Tokens attend to the latents: no mask, no biases, heads laid out as (head, width)."""

    def __init__(self, width: int, latent_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(latent_width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self.heads, self.head_width).transpose(0, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map tokens [n, width] and latents [m, latent_width] to [n, width]."""
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        query, key, value = (self._split(part)[None] for part in (self.to_q(x), keys, values))
        mixed = F.scaled_dot_product_attention(query, key, value)[0]
        projected: torch.Tensor = self.to_out(mixed.transpose(0, 1).reshape(x.shape[0], -1))
        return projected


class GEGLU(nn.Module):
    """`value * gelu(gate)`, the value being the first half; exact GELU (Shazeer 2020, arXiv 2002.05202)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., 2 width] to [..., width]."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """`net.2(GEGLU(net.0(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * FEED_FORWARD_FACTOR
        self.net = nn.Sequential(nn.Linear(width, inner * 2), GEGLU(), nn.Linear(inner, width))


class PreNorm(nn.Module):
    """A function with a layer norm before it, and one before its context where it has one."""

    def __init__(self, width: int, function: nn.Module, context_width: int | None = None) -> None:
        super().__init__()
        self.fn = function
        self.norm = nn.LayerNorm(width)
        if context_width is not None:
            self.norm_context = nn.LayerNorm(context_width)


class LatentAttention(nn.Module):
    """The head as published. Works on pooled tokens alone: what is not pooled never mixes with what is."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, latent_width = settings["hidden_dim"], settings["latent_dim"]
        attention = CrossAttention(width, latent_width, settings["num_cross_heads"], settings["cross_dim_head"])
        self.latents = nn.Parameter(torch.empty(settings["num_latents_value"], latent_width))
        self.cross_attend_blocks = nn.ModuleList(
            [PreNorm(width, attention, latent_width), PreNorm(width, FeedForward(width))],
        )

    def forward(self, hidden: torch.Tensor, mean: Mean) -> torch.Tensor:
        """Pool: token vectors [n, width] to float32 [texts, width]."""
        attend, feed = _blocks(self)
        attended = hidden + attend.fn(attend.norm(hidden), attend.norm_context(self.latents))
        return mean(attended + feed.fn.net(feed.norm(attended)))


def _blocks(head: LatentAttention) -> tuple[Any, Any]:
    """Return the attention and the feed-forward block; typed loosely, because torch types every submodule so."""
    attend, feed = head.cross_attend_blocks
    return attend, feed


class FoldedLatentAttention(nn.Module):
    """The same function with the constants multiplied out.

    Keys and values depend on the latents alone, so per head `A_h = K_h Wq_h / sqrt(width_h)` and `B_h = V_h Wo_h^T`, both
    [latents, width], replace `to_q`, `to_kv`, `to_out` and the latents: 539 M parameters become 33.6 M for NV-Embed-v2. The last
    product of the feed-forward part is linear, so it commutes with the mean and runs once a text instead of once a token.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width = settings["hidden_dim"]
        self.heads = settings["num_cross_heads"]
        rows = self.heads * settings["num_latents_value"]
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, rows, bias=False)
        self.values = nn.Linear(rows, width, bias=False)
        self.feed_norm = nn.LayerNorm(width)
        self.net = FeedForward(width).net

    def forward(self, hidden: torch.Tensor, mean: Mean) -> torch.Tensor:
        """Pool; see `LatentAttention.forward`."""
        scores = self.scores(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        attended = hidden + self.values(scores.softmax(dim=-1).flatten(-2))
        gated = self.net[1](self.net[0](self.feed_norm(attended)))
        # Back to the compute dtype for the last product; the residual's mean stays in float32.
        last: torch.Tensor = self.net[2](mean(gated).to(hidden.dtype))
        return mean(attended) + last.float()


def mean_of_rows(text: torch.Tensor, texts: int) -> Mean:
    """Average the rows of each text: `text`, int64 [n], says whose each row is."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros((texts, x.shape[1]), dtype=torch.float32, device=x.device).index_add_(0, text, x.float())
        counts = torch.zeros(texts, device=x.device).index_add_(0, text, torch.ones_like(text, dtype=torch.float32))
        return sums / counts.unsqueeze(1)

    return mean


def mean_of_padded(mask: torch.Tensor) -> Mean:
    """Average the rows of a padded batch, texts one after another, by a mask, int64 [texts, length]."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        weights = mask.to(torch.float32)
        sums: torch.Tensor = (weights.unsqueeze(1) @ x.float().view(*mask.shape, x.shape[1])).squeeze(1)
        return sums / weights.sum(dim=1, keepdim=True)

    return mean


@torch.no_grad()
def fold(head: LatentAttention) -> FoldedLatentAttention:
    """Multiply the constants of a head out, in float64.

    The two new matrices are in float32 where the head is in half precision, so that rounding is left to whoever stores them; the
    rest is the head's own.
    """
    attend, feed = _blocks(head)
    attention: CrossAttention = attend.fn
    heads, head_width = attention.heads, attention.head_width
    latents, width = head.latents.shape[0], attention.to_q.in_features
    settings = {"hidden_dim": width, "num_cross_heads": heads, "num_latents_value": latents}
    with torch.device("meta"):
        folded = FoldedLatentAttention(settings)
    context = F.layer_norm(
        head.latents.double(),
        attend.norm_context.normalized_shape,
        attend.norm_context.weight.double(),
        attend.norm_context.bias.double(),
        attend.norm_context.eps,
    )
    scores, values = [], []
    for index in range(heads):
        # One head at a time: in float64 the eight of NV-Embed-v2 together would take 4 GB more.
        rows = slice(index * head_width, (index + 1) * head_width)
        shifted = slice(heads * head_width + rows.start, heads * head_width + rows.stop)
        key = context @ attention.to_kv.weight[rows].double().t()
        value = context @ attention.to_kv.weight[shifted].double().t()
        scores.append(key @ attention.to_q.weight[rows].double() / head_width**0.5)
        values.append(value @ attention.to_out.weight[:, rows].double().t())
    dtype = torch.promote_types(head.latents.dtype, torch.float32)
    folded.scores.weight = nn.Parameter(torch.cat(scores).to(dtype), requires_grad=False)
    folded.values.weight = nn.Parameter(torch.cat(values).t().contiguous().to(dtype), requires_grad=False)
    folded.norm, folded.feed_norm, folded.net = attend.norm, feed.norm, feed.fn.net
    return folded


class LatentPooling(nn.Module):
    """The latent-attention head as the pooling of a `TextHead`: the mean of what it makes of the pooled tokens."""

    def __init__(self, latent_attention: LatentAttention | FoldedLatentAttention) -> None:
        super().__init__()
        self.latent_attention = latent_attention

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Pool hidden states; see `TextHead.forward`. Every text needs a pooled token."""
        if traced:  # by steps whose shapes do not depend on the mask: the head sees all tokens, the mean only those that are pooled
            vectors: torch.Tensor = self.latent_attention(hidden.flatten(0, 1), mean_of_padded(pooled))
            return vectors
        text, position = pooled.nonzero(as_tuple=True)
        vectors = self.latent_attention(hidden[text, position], mean_of_rows(text, len(hidden)))
        return vectors


class NVEmbedNetwork(nn.Module):
    """Backbone and head, under the names of the published checkpoint; `config` is the backbone's."""

    latent_attention_model: LatentAttention | FoldedLatentAttention

    def __init__(self, backbone: MistralConfig, settings: Mapping[str, Any], folded: bool = False) -> None:
        super().__init__()
        self.config = backbone
        self.normalize = bool(settings["output_normalize"])
        self.embedding_model = MistralModel(backbone)
        self.latent_attention_model = (FoldedLatentAttention if folded else LatentAttention)(settings)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch: int64 [texts, length] three times to float32 [texts, width]; every text needs a pooled token."""
        return vectors_of(self, input_ids, attention_mask, pool_mask)

    @property
    def backbone(self) -> MistralModel:
        """What makes hidden states of token ids."""
        return self.embedding_model

    @property
    def text_head(self) -> TextHead:
        """What makes vectors of hidden states; made anew each time, so that a head that was replaced is the one that runs."""
        return TextHead(LatentPooling(self.latent_attention_model), normalize=self.normalize)


def build(folder: ModelFolder) -> NVEmbedNetwork:
    """Build the network of a checkpoint or a variant."""
    folded = folder.variant is not None and folder.variant.folded
    return NVEmbedNetwork(folder.network_config, latent_settings(folder.config), folded)


def is_folded(model: nn.Module) -> bool:
    """Whether a network's head is NV-Embed's, folded."""
    return isinstance(getattr(model, "latent_attention_model", None), FoldedLatentAttention)
