"""Opens a model without reading its weights: its network without values, where its weights lie, how it takes texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from compress.common.errors import UserError
from compress.layers.empty import empty_layer
from compress.models.architectures import Sublayer
from compress.models.files.headers import TensorInfo, weight_files
from compress.models.files.variant import VariantInfo, is_variant
from compress.models.files.weights import Weights
from compress.models.folder import read_json, transformer_folder
from compress.models.network.build import empty_network, read_config
from compress.models.network.nv_embed import is_nv_embed, read_nv_spec
from compress.models.network.segments import blocks_of
from compress.models.network.surgery import drop_sublayer, keep_heads
from compress.models.shape import ModelShape
from compress.models.text.spec import EmbedderSpec, read_spec
from compress.models.text.tokens import TextTokenizer, open_tokenizer


@dataclass(frozen=True)
class OpenModel:
    """A model as it is about to be walked through."""

    network: nn.Module
    """Without values."""
    weights: Weights
    spec: EmbedderSpec
    tokenizer: TextTokenizer
    config: Mapping[str, Any]
    """The `config.json` of what is to be written."""
    layers: tuple[int, ...]
    """Which block of the published model each block is, from 0."""
    heads: int | None = None
    """Attention heads of each block, where it has fewer than its config can say."""
    dropped: tuple[tuple[int, Sublayer], ...] = ()
    """Sublayers that are not there, by block."""

    @property
    def shape(self) -> ModelShape:
        """Its shape as it is now, the config being that of what is to be written."""
        tensors = {name: TensorInfo("F16", tuple(tensor.shape)) for name, tensor in self.network.state_dict().items()}
        return ModelShape(type(self.network).__name__, tensors, self.config, self.layers)


LONGEST = 2**31 - 1


def read_text_side(folder: Path) -> tuple[EmbedderSpec, TextTokenizer]:
    """Read how a model's or a variant's embedder takes texts: its spec, and its tokenizer as transformers sets it up.

    The longest input is what the folder's settings say, else what both the tokenizer and the network's positions allow, as in
    sentence-transformers.

    Raises:
        UserError: there is no tokenizer, or only one without a Rust implementation.
    """
    from transformers import AutoTokenizer

    if is_variant(folder):
        info = VariantInfo.read(folder)
        return info.spec, info.tokenizer(folder)
    if is_nv_embed(folder):
        spec = read_nv_spec(folder)
        # Its tokenizer.json as it stands: that is what the original loads, and it needs nothing from a hub.
        return spec, TextTokenizer(open_tokenizer(folder), spec.max_length or LONGEST, spec)
    spec, inner = read_spec(folder), transformer_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(inner, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{inner}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{inner}: {type(tokenizer).__name__} has no Rust tokenizer (tokenizer.json)")
    positions = getattr(read_config(inner), "max_position_embeddings", None) or LONGEST
    longest = spec.max_length or min(int(tokenizer.model_max_length), positions, LONGEST)
    return spec, TextTokenizer(backend, longest, spec)


def empty_model(folder: Path) -> nn.Module:
    """Build the network of a model's or a variant's folder, its parameters without values."""
    if not is_variant(folder):
        return empty_network(transformer_folder(folder))
    info = VariantInfo.read(folder)
    model = empty_network(folder, info.folded)
    if info.heads is not None:
        keep_heads(model, info.heads)
    for number, sublayer in info.dropped:
        drop_sublayer(blocks_of(model)[1][number], sublayer)
    for name, layer in info.quantized.items():
        model.set_submodule(name, empty_layer(model.get_submodule(name), layer))
    return model


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move what no file holds, such as rotary frequencies, to a device; parameters without values stay without."""
    for module in model.modules():
        for buffer, tensor in module.named_buffers(recurse=False):
            if not tensor.is_meta:
                setattr(module, buffer, tensor.to(device))


def weights_of(folder: Path, model: nn.Module) -> Weights:
    """Open the weights of a model's or a variant's folder for `empty_model`'s network; none is read yet."""
    exact = is_variant(folder) or is_nv_embed(folder)
    return Weights(weight_files(transformer_folder(folder)), model, exact=exact)


def open_model(folder: Path) -> OpenModel:
    """Open a checkpoint, or a variant that is not finished, to be made smaller; no weight is read yet."""
    network = empty_model(folder)
    config = read_json(transformer_folder(folder) / "config.json")
    opened = OpenModel(
        network, weights_of(folder, network), *read_text_side(folder), config, tuple(range(len(blocks_of(network)[1])))
    )
    if not is_variant(folder):
        return opened
    info = VariantInfo.read(folder)
    return replace(opened, layers=info.layers or opened.layers, heads=info.heads, dropped=info.dropped)
