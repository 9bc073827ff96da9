"""From hidden states to vectors, in one place for every network: pooling, then normalisation.

Embedders, streamed walks, calibration, training and graphs all run a network's `text_head`.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn

from compress.models.text.spec import EmbedderSpec, Pooling


class TokenPooling(nn.Module):
    """Pooling without weights: the first token, the last token, or the mean."""

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
"""The pooling functions by mode. Each maps hidden states [texts, length, width] and the masks of tokens and of pooled tokens, both
int64 [texts, length], to float32 [texts, width]."""


class TextHead(nn.Module):
    """The part of a network that turns hidden states into vectors."""

    def __init__(self, pooling: nn.Module, *, normalize: bool) -> None:
        """Combine a pooling with normalisation.

        Args:
            pooling: a `TokenPooling`, or a module with the same signature.
            normalize: whether to scale the vectors to unit length after pooling.
        """
        super().__init__()
        self.pooling = pooling
        self.normalize = normalize

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Turn hidden states into vectors.

        Args:
            hidden: hidden states after the final norm, [texts, length, width] in any floating dtype.
            tokens: int64 [texts, length], 1 for tokens and 0 for padding, which is on the right.
            pooled: int64 [texts, length], 1 for the tokens to pool: all of them, or those after a prompt.
            traced: whether the call is traced for a graph, in which shapes must not depend on the masks.

        Returns:
            float32 [texts, dimension], differentiable.
        """
        vectors: torch.Tensor = self.pooling(hidden, tokens, pooled, traced=traced)
        return nn.functional.normalize(vectors, dim=1) if self.normalize else vectors


class TextNetwork(Protocol):
    """A network with a head that makes vectors, as `compress.models.network.build` returns it."""

    text_head: TextHead
    """The head."""


def attach_head(network: nn.Module, spec: EmbedderSpec) -> nn.Module:
    """Attach the head that a spec describes to a transformers network, and return the network."""
    network.text_head = TextHead(TokenPooling(spec.pooling), normalize=spec.normalize)
    return network


def head_of(network: nn.Module) -> TextHead:
    """Return a network's head."""
    return cast(TextNetwork, network).text_head


def backbone_of(network: nn.Module) -> nn.Module:
    """Return the module that computes hidden states from token ids: the network's `backbone`, or a transformers network itself."""
    return getattr(network, "backbone", network)


def vectors_of(
    network: nn.Module, ids: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False
) -> torch.Tensor:
    """Embed a padded batch.

    Args:
        network: a network with a `text_head`.
        ids: int64 [texts, length].
        tokens: see `TextHead.forward`.
        pooled: see `TextHead.forward`.
        traced: see `TextHead.forward`.

    Returns:
        float32 [texts, dimension].
    """
    hidden = backbone_of(network)(input_ids=ids, attention_mask=tokens).last_hidden_state
    vectors: torch.Tensor = head_of(network)(hidden, tokens, pooled, traced=traced)
    return vectors


class TracedNetwork(nn.Module):
    """A network from token ids to vectors, in the form that is traced for a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed a batch: int64 [texts, length] to float32 [texts, dimension]. Without `pool_mask` all tokens are pooled."""
        return vectors_of(self.network, input_ids, attention_mask, attention_mask if pool_mask is None else pool_mask, traced=True)
