"""From hidden states to vectors, in one place for every network: pooling, then what comes after it.

An embedder, a streamed walk, calibration, training and graphs all run a network's `text_head`.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn

from compress.models.text.spec import EmbedderSpec, Pooling


class TokenPooling(nn.Module):
    """Pooling without weights: the first token, the last one, or the mean."""

    def __init__(self, mode: Pooling) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Pool hidden states; see `TextHead.forward`."""
        return POOLINGS[self.mode](hidden, tokens, pooled)


def _first(hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return hidden[:, 0].float()


def _last(hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), tokens.sum(dim=1).clamp_min(1) - 1].float()


def _mean(hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    weights = pooled.to(torch.float32)
    # A product of [1, length] with [length, width]: no masked copy of the hidden states.
    return (weights.unsqueeze(1) @ hidden.float()).squeeze(1) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)


POOLINGS = {Pooling.CLS: _first, Pooling.LAST: _last, Pooling.MEAN: _mean}
"""By mode, from hidden states [texts, length, width], the tokens and the pooled ones, int64 [texts, length], to float32."""


class TextHead(nn.Module):
    """From hidden states to vectors."""

    def __init__(self, pooling: nn.Module, *, normalize: bool) -> None:
        """Take the pooling, a `TokenPooling` or a module that is called like one; `normalize`: to unit length at the end."""
        super().__init__()
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Make vectors of hidden states.

        Args:
            hidden: [texts, length, width], after the final norm, any floating dtype.
            tokens: int64 [texts, length], 1 for tokens, 0 for padding on the right.
            pooled: int64 [texts, length], 1 for tokens that enter a mean: all of them, or those after a prompt.
            traced: whether a graph is made of it, in which no shape may depend on the masks.

        Returns:
            float32 [texts, dimension]; gradients flow.
        """
        vectors: torch.Tensor = self.pooling(hidden, tokens, pooled, traced=traced)
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors


class TextNetwork(Protocol):
    """A network that embeds: what `compress.models.network.build` makes."""

    text_head: TextHead


def attach_head(network: nn.Module, spec: EmbedderSpec) -> nn.Module:
    """Give a network of transformers the head that a spec describes, and return the network."""
    network.text_head = TextHead(TokenPooling(spec.pooling), normalize=spec.normalize)
    return network


def head_of(network: nn.Module) -> TextHead:
    """Return a network's head."""
    return cast(TextNetwork, network).text_head


def backbone_of(network: nn.Module) -> nn.Module:
    """Return what makes hidden states of token ids; the network itself where it is one of transformers' own."""
    return getattr(network, "backbone", network)


def vectors_of(
    network: nn.Module, ids: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False
) -> torch.Tensor:
    """Embed a padded batch, int64 [texts, length] three times: float32 [texts, dimension]; see `TextHead.forward`."""
    hidden = backbone_of(network)(input_ids=ids, attention_mask=tokens).last_hidden_state
    vectors: torch.Tensor = head_of(network)(hidden, tokens, pooled, traced=traced)
    return vectors


class TracedNetwork(nn.Module):
    """From token ids to vectors, as a graph is made of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed a batch: int64 [texts, length] each to float32 [texts, dimension]; without `pool_mask` every token is pooled."""
        return vectors_of(self.network, input_ids, attention_mask, attention_mask if pool_mask is None else pool_mask, traced=True)
