"""NV-Embed: Mistral without a causal mask, pooled by latent attention, and the same head folded to a fifteenth of its size.

Lee et al. 2024, "NV-Embed", arXiv 2405.17428, section 3. Modules have the names of the published checkpoint (nvidia/NV-Embed-v2),
so its tensors load by name. tests/models/network/test_nv_embed.py compares the outputs with those of the original code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import MistralConfig, MistralModel

from compress.models.folder import ModelFolder
from compress.models.network.pooling import HEAD_MODULES, PackedRows, TextHead, unrotation, vectors_of
from compress.models.text.nv_embed import latent_settings
from compress.models.text.spec import EmbedderSpec

FEED_FORWARD_FACTOR = 4

Mean = Callable[[torch.Tensor], torch.Tensor]
"""A function that averages the rows that belong to each text: [rows, width] to float32 [texts, width]."""


class CrossAttention(nn.Module):
    """Attention from tokens (queries) to latents (keys and values), without mask or biases. Heads are stored as (head, width)."""

    def __init__(self, width: int, latent_width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.to_q = nn.Linear(width, heads * head_width, bias=False)
        self.to_kv = nn.Linear(latent_width, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, width, bias=False)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self.heads, self.head_width).transpose(0, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map tokens [rows, width] and latents [latents, latent_width] to [rows, width]."""
        keys, values = self.to_kv(context).chunk(2, dim=-1)
        query, key, value = (self._split(part)[None] for part in (self.to_q(x), keys, values))
        mixed = F.scaled_dot_product_attention(query, key, value)[0]
        projected: torch.Tensor = self.to_out(mixed.transpose(0, 1).reshape(x.shape[0], -1))
        return projected


class GEGLU(nn.Module):
    """`value * gelu(gate)` with the exact GELU (Shazeer 2020, arXiv 2002.05202). The value is the first half of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., 2 width] to [..., width]."""
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """The head's feed-forward network, `net.2(GEGLU(net.0(x)))`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width * FEED_FORWARD_FACTOR
        self.net = nn.Sequential(nn.Linear(width, inner * 2), GEGLU(), nn.Linear(inner, width))


class PreNorm(nn.Module):
    """Holds a module, the layer norm of its input and, if it has a context, the layer norm of the context."""

    def __init__(self, width: int, function: nn.Module, context_width: int | None = None) -> None:
        super().__init__()
        self.fn = function
        self.norm = nn.LayerNorm(width)
        if context_width is not None:
            self.norm_context = nn.LayerNorm(context_width)


class LatentAttention(nn.Module):
    """The published head. It treats each token by itself until the mean, so it can be run on the pooled tokens only."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__()
        width, latent_width = settings["hidden_dim"], settings["latent_dim"]
        attention = CrossAttention(width, latent_width, settings["num_cross_heads"], settings["cross_dim_head"])
        self.latents = nn.Parameter(torch.empty(settings["num_latents_value"], latent_width))
        self.cross_attend_blocks = nn.ModuleList(
            [PreNorm(width, attention, latent_width), PreNorm(width, FeedForward(width))],
        )

    def forward(self, hidden: torch.Tensor, mean: Mean) -> torch.Tensor:
        """Pool the tokens of a batch of texts.

        Args:
            hidden: hidden states of the tokens, [rows, width].
            mean: averages the rows of each text.

        Returns:
            float32 [texts, width].
        """
        attend, feed = _blocks(self)
        attended = hidden + attend.fn(attend.norm(hidden), attend.norm_context(self.latents))
        return mean(attended + feed.fn.net(feed.norm(attended)))


def _blocks(head: LatentAttention) -> tuple[Any, Any]:
    """Return the attention and the feed-forward block, typed as Any because torch types every submodule as a Module."""
    attend, feed = head.cross_attend_blocks
    return attend, feed


class FoldedLatentAttention(nn.Module):
    """The same head with constant matrices multiplied in advance. `fold` computes them.

    Keys K_h and values V_h of head h depend only on the latents, so they are constants. For a normalised token x:

    - Attention scores: `(x Wq_h^T) K_h^T / sqrt(d) = x A_h^T` with `A_h = K_h Wq_h / sqrt(d)`, where d is the width of a head.
    - Attention output: `softmax(x A_h^T) V_h Wo_h^T = softmax(x A_h^T) B_h` with `B_h = V_h Wo_h^T`, summed over heads.

    A_h and B_h, both [latents, width], replace `to_q`, `to_kv`, `to_out` and the latents. For NV-Embed-v2, 539 M parameters become
    33.6 M. The last layer of the feed-forward network is affine, so it can follow the mean: it runs once per text instead of once
    per token.
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
        """Pool the tokens of a batch of texts; see `LatentAttention.forward`."""
        # One product for all heads: rows of `scores` are the A_h one after another. The softmax is over each head's latents.
        scores = self.scores(self.norm(hidden)).unflatten(-1, (self.heads, -1))
        attended = hidden + self.values(scores.softmax(dim=-1).flatten(-2))
        gated = self.net[1](self.net[0](self.feed_norm(attended)))
        # The mean goes back to the compute dtype for the last layer; the mean of the residual stays in float32.
        last: torch.Tensor = self.net[2](mean(gated).to(hidden.dtype))
        return mean(attended) + last.float()


def mean_of_rows(text: torch.Tensor, texts: int) -> Mean:
    """Return a mean over the rows of each text.

    Args:
        text: int64 [rows], the number of the text that each row belongs to. Every text needs a row.
        texts: number of texts.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros((texts, x.shape[1]), dtype=torch.float32, device=x.device).index_add_(0, text, x.float())
        counts = torch.zeros(texts, device=x.device).index_add_(0, text, torch.ones_like(text, dtype=torch.float32))
        return sums / counts.unsqueeze(1)

    return mean


def mean_of_padded(mask: torch.Tensor) -> Mean:
    """Return a mean over the pooled rows of each text in a padded batch, with [texts, length] flattened to rows.

    Args:
        mask: int64 [texts, length], 1 for rows that enter the mean. Every text needs one.
    """

    def mean(x: torch.Tensor) -> torch.Tensor:
        weights = mask.to(torch.float32)
        sums: torch.Tensor = (weights.unsqueeze(1) @ x.float().view(*mask.shape, x.shape[1])).squeeze(1)
        return sums / weights.sum(dim=1, keepdim=True)

    return mean


def mean_of_packed(rows: PackedRows) -> Mean:
    """Return a mean over the pooled rows of each text of a packed batch. A text of which nothing is pooled becomes not-a-number."""
    weights = rows.pooled.to(torch.float32).unsqueeze(1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return rows.sums(x.float() * weights) / rows.sums(weights)

    return mean


@torch.no_grad()
def fold(head: LatentAttention) -> FoldedLatentAttention:
    """Fold a head: compute the constant matrices of `FoldedLatentAttention`, in float64.

    Starts from the latent-attention layer of Lee et al. 2024, arXiv 2405.17428, section 3. The two new matrices are returned in
    float32 if the head is in half precision, so that they are rounded only when they are stored. The other layers are shared with
    the head.
    """
    attend, feed = _blocks(head)
    attention: CrossAttention = attend.fn
    heads, head_width = attention.heads, attention.head_width
    latents, width = head.latents.shape[0], attention.to_q.in_features
    settings = {"hidden_dim": width, "num_cross_heads": heads, "num_latents_value": latents}
    with torch.device("meta"):
        folded = FoldedLatentAttention(settings)
    # Step 1: the normalised latents, from which keys and values come. They do not depend on the input.
    context = F.layer_norm(
        head.latents.double(),
        attend.norm_context.normalized_shape,
        attend.norm_context.weight.double(),
        attend.norm_context.bias.double(),
        attend.norm_context.eps,
    )
    scores, values = [], []
    for index in range(heads):
        # One head at a time: in float64, all eight heads of NV-Embed-v2 together would take 4 GB more.
        # `to_kv` holds the keys of all heads, then the values of all heads.
        rows = slice(index * head_width, (index + 1) * head_width)
        shifted = slice(heads * head_width + rows.start, heads * head_width + rows.stop)
        # Step 2: K_h and V_h, [latents, head width].
        key = context @ attention.to_kv.weight[rows].double().t()
        value = context @ attention.to_kv.weight[shifted].double().t()
        # Step 3: A_h = K_h Wq_h / sqrt(d) and B_h = V_h Wo_h^T, [latents, width].
        scores.append(key @ attention.to_q.weight[rows].double() / head_width**0.5)
        values.append(value @ attention.to_out.weight[:, rows].double().t())
    # Step 4: all heads in one linear layer each. A linear layer stores its matrix as [out, in], so the B_h are transposed.
    dtype = torch.promote_types(head.latents.dtype, torch.float32)
    folded.scores.weight = nn.Parameter(torch.cat(scores).to(dtype), requires_grad=False)
    folded.values.weight = nn.Parameter(torch.cat(values).t().contiguous().to(dtype), requires_grad=False)
    folded.norm, folded.feed_norm, folded.net = attend.norm, feed.norm, feed.fn.net
    return folded


class LatentPooling(nn.Module):
    """NV-Embed's latent-attention head as the pooling of a `TextHead`."""

    def __init__(self, latent_attention: LatentAttention | FoldedLatentAttention) -> None:
        super().__init__()
        self.latent_attention = latent_attention

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Pool hidden states; see `TextHead.forward`. Every text needs a pooled token."""
        # In a graph no shape may depend on the mask: the head runs on all tokens, and the mean leaves out those not pooled.
        if traced:
            vectors: torch.Tensor = self.latent_attention(hidden.flatten(0, 1), mean_of_padded(pooled))
            return vectors
        text, position = pooled.nonzero(as_tuple=True)
        vectors = self.latent_attention(hidden[text, position], mean_of_rows(text, len(hidden)))
        return vectors

    def packed(self, hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Pool the hidden states of a packed batch; see `TextHead.packed`. Every text needs a pooled token.

        The head runs on prompts too, and the mean leaves them out: to select rows would wait for the device.
        """
        vectors: torch.Tensor = self.latent_attention(hidden, mean_of_packed(rows))
        return vectors


class NVEmbedNetwork(nn.Module):
    """Backbone and head, under the names of the published checkpoint. `config` is the backbone's config."""

    latent_attention_model: LatentAttention | FoldedLatentAttention
    """The head, as published or folded."""

    def __init__(self, backbone: MistralConfig, settings: Mapping[str, Any], folded: bool = False) -> None:
        super().__init__()
        self.config = backbone
        self.normalize = bool(settings["output_normalize"])
        self.embedding_model = MistralModel(backbone)
        self.latent_attention_model = (FoldedLatentAttention if folded else LatentAttention)(settings)
        self.after = nn.ModuleList()
        self.unrotate: nn.Module | None = None
        self.dimensions: int | None = None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor) -> torch.Tensor:
        """Embed a batch: inputs int64 [texts, length], result float32 [texts, width]. Every text needs a pooled token."""
        return vectors_of(self, input_ids, attention_mask, pool_mask)

    @property
    def backbone(self) -> MistralModel:
        """The module that computes hidden states from token ids."""
        return self.embedding_model

    @property
    def text_head(self) -> TextHead:
        """The head that turns hidden states into vectors. It is created on each access, so that it uses a replaced head."""
        pooling = LatentPooling(self.latent_attention_model)
        return TextHead(pooling, list(self.after), normalize=self.normalize, dimensions=self.dimensions, unrotate=self.unrotate)

    def finish_with(self, spec: EmbedderSpec) -> None:
        """Put the modules of a spec around the latent attention, without values, and end as the spec says."""
        self.unrotate = unrotation(self) if spec.rotated else None
        self.after = nn.ModuleList(HEAD_MODULES[module.kind](module) for module in spec.modules)
        self.normalize, self.dimensions = spec.normalize, spec.dimensions


def build(folder: ModelFolder) -> NVEmbedNetwork:
    """Build the network of a checkpoint or a variant; see `compress.models.network.build.empty_network`."""
    folded = folder.variant is not None and folder.variant.folded
    network = NVEmbedNetwork(copy.deepcopy(folder.network_config), latent_settings(folder.config), folded)
    if folder.spec.modules or folder.spec.rotated:
        network.finish_with(folder.spec)
    return network


def is_folded(model: nn.Module) -> bool:
    """Whether a network has NV-Embed's head in its folded form."""
    return isinstance(getattr(model, "latent_attention_model", None), FoldedLatentAttention)
