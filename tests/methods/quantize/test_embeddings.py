"""The token embedding table as integers."""

from __future__ import annotations

from pathlib import Path

import torch
from tests_support import apply_in_memory, folder_of

from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.methods.quantize.embeddings import Embeddings
from compress.models.network.build import load_network


def test_the_token_table_and_no_other(bert: Path) -> None:
    network = load_network(folder_of(bert), torch.float32)
    before = network.embeddings.word_embeddings.weight.detach().clone()
    assert set(apply_in_memory(network, Embeddings())) == {"embeddings.word_embeddings"}
    table = network.embeddings.word_embeddings
    assert isinstance(table, QuantizedEmbedding)
    assert type(network.embeddings.position_embeddings) is torch.nn.Embedding
    error = (table(torch.arange(600)) - before).abs()
    assert (error <= before.abs().amax(dim=1, keepdim=True) / 127).all()
