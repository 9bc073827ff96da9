"""Blocks that run without a sublayer."""

from __future__ import annotations

from pathlib import Path

import torch
from tests_support import folder_of

from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of
from compress.models.network.surgery import without


def test_a_block_runs_without_a_sublayer_only_for_a_while(bert: Path) -> None:
    block = blocks_of(load_network(folder_of(bert), torch.float32))[1][0]
    before = [name for name, _ in block.named_modules()]
    with without(block, ["mlp", "attention"]):
        assert "intermediate.dense" not in dict(block.named_modules())
    assert [name for name, _ in block.named_modules()] == before
