"""Variants to export, and their layers as the variant stores them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests_support import compress_to, folder_of
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from compress.methods.base import Method
from compress.models.opened import empty_model, weights_of

MakeVariant = Callable[..., Path]


@pytest.fixture(scope="session")
def decoder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain transformers folder: a Mistral whose widths are multiples of 32, as the GPTQ layout wants them."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mistral", vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=66, initializer_range=0.2, pad_token_id=0, sliding_window=None, rope_theta=5e4, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_variant(tmp_path: Path) -> MakeVariant:
    """Compress a model by some steps; returns a folder with `variant` in it, as a run leaves it."""

    def make(model: Path, *steps: Method) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        compress_to(model, run / "variant", *steps)
        return run

    return make


@pytest.fixture(scope="session")
def filled() -> Callable[[Path], torch.nn.Module]:
    """Open a run's variant as our runtime stores it: layers with the integers, scales and zeros of the file."""

    def fill(run: Path) -> torch.nn.Module:
        network = empty_model(folder_of(run / "variant"))
        weights_of(folder_of(run / "variant"), network).fill(network)
        return network

    return fill
