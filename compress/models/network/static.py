"""A static table as a network: embeddings, an empty list of blocks, and the head. See `compress.models.text.static`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from compress.models.folder import ModelFolder
from compress.models.network.pooling import attach_head
from compress.models.text.static import StaticConfig


class TokenVectors(nn.Module):
    """The vectors of tokens: rows of a table, which tokens may share, each times the token's factor if it has one."""

    token_mapping: torch.Tensor | None
    """Row of each token, integers [tokens]; None: its number."""
    token_weights: nn.Parameter | None
    """Factor of each token, floating point [tokens]; None: 1."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vectors, config.hidden_size)
        self.token_weights = nn.Parameter(torch.empty(config.vocab_size)) if config.weighted else None
        mapping = torch.empty(config.vocab_size, dtype=torch.int64, device="meta") if config.shared else None
        self.register_buffer("token_mapping", mapping)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map tokens, int64 [texts, length], to [texts, length, width]."""
        rows = ids if self.token_mapping is None else self.token_mapping[ids]
        vectors: torch.Tensor = self.word_embeddings(rows)
        return vectors if self.token_weights is None else vectors * self.token_weights[ids].unsqueeze(-1)

    def keep(self, kept: torch.Tensor) -> None:
        """Leave only some tokens, numbered anew in the order given, int64 [kept]. Rows that tokens share all stay."""
        if self.token_weights is not None:
            self.token_weights = nn.Parameter(self.token_weights.data[kept], requires_grad=False)
        if self.token_mapping is not None:
            self.token_mapping = self.token_mapping[kept]


class StaticNetwork(nn.Module):
    """A network without blocks, called as those of transformers are."""

    def __init__(self, config: StaticConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TokenVectors(config)
        self.layers = nn.ModuleList()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        """Look tokens up, int64 [texts, length]; `last_hidden_state` is [texts, length, width]."""
        return SimpleNamespace(last_hidden_state=self.embeddings(input_ids))


def build(folder: ModelFolder) -> nn.Module:
    """Build the network of a static table, with its head."""
    return attach_head(StaticNetwork(folder.network_config), folder.spec)
