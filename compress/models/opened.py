"""Opens a model without reading its weights: an empty network, access to the stored weights, and how it takes texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from compress.common.errors import UserError, first_line
from compress.layers.empty import empty_layer
from compress.models.architectures import Sublayer
from compress.models.files.headers import TensorInfo
from compress.models.files.variant import VARIANT_FILE, AlignedTo, BlockSizes
from compress.models.files.weights import Weights
from compress.models.folder import ModelFolder
from compress.models.network.build import empty_network
from compress.models.network.segments import blocks_of, segments_of
from compress.models.network.surgery import drop_sublayer, keep_channels, keep_heads
from compress.models.shape import ModelShape
from compress.models.source import check_original
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import TextTokenizer


@dataclass(frozen=True)
class OpenModel:
    """A model that is open but not loaded, ready to be walked and compressed."""

    network: nn.Module
    """The network, with its parameters on the meta device."""
    weights: Weights
    """The stored weights; none has been read."""
    spec: EmbedderSpec
    """How the model takes texts."""
    tokenizer: TextTokenizer
    """The model's tokenizer."""
    config: Mapping[str, Any]
    """The `config.json` to write for the compressed model."""
    layers: tuple[int, ...]
    """The number that each block has in the published model, from 0."""
    heads: int | None = None
    """Number of attention heads of each block, if heads were pruned and the config cannot store it; else None."""
    blocks: tuple[BlockSizes, ...] = ()
    """Sizes of blocks that differ from each other, which no config can store."""
    resized: Mapping[str, TensorInfo] = field(default_factory=dict)
    """Tensors that the walk will make smaller, as they will be."""
    dropped: tuple[tuple[int, Sublayer], ...] = ()
    """The sublayers that were dropped, each with its block's current number."""
    aligned_to: AlignedTo | None = None
    """The model whose index the vectors search; None: only the model's own."""
    depths: tuple[int, ...] = ()
    """The numbers of blocks to which the model was trained to be cut; empty: it was not."""

    @property
    def shape(self) -> ModelShape:
        """The shape of the network as the steps so far leave it, with the config to write."""
        tensors = {name: TensorInfo("F16", tuple(tensor.shape)) for name, tensor in self.network.state_dict().items()}
        return ModelShape(type(self.network).__name__, {**tensors, **self.resized}, self.config, self.layers)


def empty_model(folder: ModelFolder) -> nn.Module:
    """Build the network of a model or variant, with its parameters on the meta device.

    A variant's changes to the architecture are applied: pruned heads and channels, dropped sublayers, quantized layers.

    Raises:
        UserError: the variant names a block or a layer that the network does not have.
    """
    if not folder.is_variant:
        folder.check_sizes()
    model = empty_network(folder)
    info = folder.variant
    if info is None:
        return model
    blocks = blocks_of(model)[1]
    everywhere = [] if info.heads is None else [BlockSizes(block=number, heads=info.heads) for number in range(len(blocks))]
    for each in (*everywhere, *info.blocks):
        _resize(folder, blocks, each)
    for number, sublayer in info.dropped:
        if not 0 <= number < len(blocks):
            raise UserError(f"{folder.path / VARIANT_FILE}: dropped: block {number}, and config.json has {len(blocks)} blocks")
        drop_sublayer(blocks[number], sublayer)
    for name, layer in info.quantized.items():
        try:
            model.set_submodule(name, empty_layer(model.get_submodule(name), layer))
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{folder.path / VARIANT_FILE}: quantized.{name}: {first_line(error)}") from error
    return model


def _resize(folder: ModelFolder, blocks: nn.ModuleList, sizes: BlockSizes) -> None:
    """Give a block of an empty network its own sizes.

    Raises:
        UserError: there is no such block, or it cannot have them.
    """
    place = f"{folder.path / VARIANT_FILE}: block {sizes.block}"
    if sizes.block >= len(blocks):
        raise UserError(f"{place}, and config.json has {len(blocks)} blocks")
    try:
        if sizes.heads is not None:
            keep_heads(blocks[sizes.block], sizes.heads, sizes.key_heads)
        if sizes.channels is not None:
            keep_channels(blocks[sizes.block], sizes.channels)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that no file holds, such as rotary frequencies, to a device; tensors on the meta device stay there."""
    for module in model.modules():
        for buffer, tensor in module.named_buffers(recurse=False):
            if not tensor.is_meta:
                setattr(module, buffer, tensor.to(device))


def weights_of(folder: ModelFolder, model: nn.Module) -> Weights:
    """Open the weights of a model's or a variant's folder for `empty_model`'s network; none is read yet.

    Raises:
        UserError: they do not fit the network.
    """
    weights = Weights(folder.tensors, model, exact=folder.has_exact_weights)
    if folder.is_variant:
        weights.check_numbers()
    return weights


def check_compressible(folder: ModelFolder) -> None:
    """See that a model is one that can be opened and walked to compress it. No weight is read.

    Raises:
        UserError: it is not; says what a run would say.
    """
    check_original(folder)
    segments_of(open_model(folder).network)


def open_model(folder: ModelFolder) -> OpenModel:
    """Open a checkpoint, or a variant that a run is still working on, to compress it. No weight is read yet."""
    network = empty_model(folder)
    blocks = tuple(range(len(blocks_of(network)[1])))
    opened = OpenModel(network, weights_of(folder, network), folder.spec, folder.tokenizer, folder.config, blocks)
    info = folder.variant
    if info is None:
        return opened
    made = replace(opened, layers=info.layers or opened.layers, heads=info.heads, blocks=info.blocks)
    return replace(made, dropped=info.dropped, aligned_to=info.aligned_to, depths=info.depths)
