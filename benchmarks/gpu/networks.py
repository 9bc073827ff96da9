"""NV-Embed-v2's network with random weights, drawn on the card and written nowhere, and the ways of running it."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from nv_head import folded_twin
from torch import nn

from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.network.build import empty_network
from compress.models.network.nv_embed import NVEmbedNetwork
from compress.models.network.packed import Packed, prepared, set_packed
from compress.models.random_weights import random_std
from compress.models.shape import known_config
from compress.models.text.packed import pack
from compress.models.text.tokens import Ids, pad_batch
from compress.runtimes.torch_runtime import prepare

MODEL = "nvidia/NV-Embed-v2"
SMALL_TEXT = {
    "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512,
}  # fmt: skip
SMALL_LATENTS = {"num_latents_value": 16, "num_cross_heads": 2, "cross_dim_head": 32, "hidden_dim": 64, "latent_dim": 64}
LOWEST_ID = 3
"""Ids below are special tokens."""
TRIAL = (5, 40)
"""Lengths of the texts that a network is tried with before it is packed."""


def random_network(device: torch.device, dtype: torch.dtype, *, small: bool) -> NVEmbedNetwork:
    """Build NV-Embed-v2's network, head not folded, with random weights sampled on the device; `small`: a tiny one of its kind."""
    config = known_config(MODEL)
    assert config is not None
    if small:
        config["hidden_size"] = SMALL_TEXT["hidden_size"]
        config["text_config"] |= SMALL_TEXT
        config["latent_attention_config"] |= SMALL_LATENTS
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        network = empty_network(ModelFolder("", Path(folder)))
    assert isinstance(network, NVEmbedNetwork)
    blocks = config["text_config"]["num_hidden_layers"]
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(network.named_parameters()):
        std = random_std(name, tuple(parameter.shape), blocks)
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = value.fill_(0.0 if name.endswith("bias") else 1.0) if std is None else value.normal_(0, std, generator=generator)
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return network.to(device).eval()


def sharing(network: NVEmbedNetwork) -> NVEmbedNetwork:
    """Return a copy that shares all tensors: its modules can be replaced, and its attention set, without changing the original."""
    memo = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return copy.deepcopy(network, memo)


def folded(network: NVEmbedNetwork, dtype: torch.dtype) -> NVEmbedNetwork:
    """Return the network with its head folded, sharing the backbone's tensors."""
    twin = sharing(folded_twin(network))
    twin.latent_attention_model.to(dtype)
    return twin


def ready(network: NVEmbedNetwork, step: Method | None, device: torch.device, dtype: torch.dtype) -> NVEmbedNetwork:
    """Return a network as the torch runtime runs it, its blocks quantized by `step`; the given one is unchanged.

    Blocks are quantized where they are, one after another: the new tensors are all that this takes.
    """
    twin = sharing(network)
    if step is not None:
        for index, block in enumerate(twin.embedding_model.layers):
            step.apply({f"layers.{index}": block})
    prepared_network = prepare(twin.eval(), dtype, device)
    assert isinstance(prepared_network, NVEmbedNetwork)
    return prepared_network


def packed_form(network: NVEmbedNetwork, device: torch.device, dtype: torch.dtype) -> NVEmbedNetwork:
    """Set a network to packed batches, and return it.

    Raises:
        RuntimeError: it cannot be packed.
    """
    why = set_packed(network, random_rows(TRIAL, vocabulary(network)), device, dtype)
    if why is not None:
        raise RuntimeError(f"cannot be packed: {why}")
    return network


def vocabulary(network: NVEmbedNetwork) -> int:
    """Return the number of tokens that a network knows."""
    return int(network.config.text_config.vocab_size if hasattr(network.config, "text_config") else network.config.vocab_size)


def random_rows(lengths: tuple[int, ...] | list[int], tokens: int, seed: int = 0) -> list[Ids]:
    """Draw the ids of texts of given lengths, int64 [length] each."""
    draw = np.random.default_rng(seed)
    return [draw.integers(LOWEST_ID, tokens, size=length).astype(np.int64) for length in lengths]


def packed_batch(rows: list[Ids], network: NVEmbedNetwork, device: torch.device) -> Packed:
    """Put texts end to end, on the device."""
    return prepared(pack(rows), network, 0).to(device)


def padded_batch(rows: list[Ids], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill texts up to one length: ids and mask, int64 [texts, length], on the device."""
    ids, mask = (torch.from_numpy(part).to(device) for part in pad_batch(rows))
    return ids, mask


def products_per_token(network: NVEmbedNetwork, length: int) -> float:
    """Return the floating-point operations that the blocks take for a token of a text of `length` tokens, attention included."""
    layers = network.embedding_model.layers
    weights = sum(parameter.numel() for parameter in layers.parameters())
    return 2.0 * weights + 4.0 * length * network.embedding_model.config.hidden_size * len(layers)
