"""A table of tokens that also learns through one linear map, so that tokens that the texts lack learn with those that occur."""

from __future__ import annotations

import torch
from torch import nn

from compress.models.network.static import TokenVectors


class SharedMap(nn.Embedding):
    """A table W, float32 [tokens, width], whose rows are also moved by what a map learns: W + F C, with F the first table.

    W begins as F and C as zero. A row of W gets gradients only from texts with its token. C gets them from all texts, and moves a
    token along with those whose first vectors are like its own.
    """

    first: torch.Tensor
    """F, which is not trained."""

    def __init__(self, table: nn.Embedding) -> None:
        """`table`: what it begins as; its weight is trained in place."""
        super().__init__(table.num_embeddings, table.embedding_dim, device="meta")
        self.weight = table.weight
        # A training that is continued opens the same first table again, so no checkpoint holds it.
        self.register_buffer("first", table.weight.detach().clone(), persistent=False)
        self.change = nn.Parameter(torch.zeros(table.embedding_dim, table.embedding_dim))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Look rows up, int64 [texts, length]; the result is [texts, length, width]."""
        # Each row of a batch goes through the map once.
        different, places = torch.unique(rows, return_inverse=True)  # type: ignore[no-untyped-call]
        return self._moved(self.weight[different], self.first[different])[places]

    @torch.no_grad()
    def plain(self) -> nn.Embedding:
        """Return an ordinary table of the moved rows."""
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, device="meta")
        table.weight = nn.Parameter(self._moved(self.weight, self.first), requires_grad=False)
        return table

    def _moved(self, rows: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        return rows + first @ self.change


def put_map(network: nn.Module) -> None:
    """Give a static table's rows a shared map to learn through."""
    vectors = _vectors(network)
    vectors.word_embeddings = SharedMap(vectors.word_embeddings)


def take_map(network: nn.Module) -> None:
    """Merge what the map has learned into the rows."""
    vectors = _vectors(network)
    assert isinstance(vectors.word_embeddings, SharedMap)
    vectors.word_embeddings = vectors.word_embeddings.plain()


def _vectors(network: nn.Module) -> TokenVectors:
    return next(module for module in network.modules() if isinstance(module, TokenVectors))
