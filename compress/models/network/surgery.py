"""Blocks, sublayers, heads and channels taken out of a network: what is left is what its architecture would be without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compress.layers.dropped import STAND_INS
from compress.models.architectures import Anatomy, Sublayer, anatomy_of
from compress.models.network.pooling import backbone_of
from compress.models.network.segments import blocks_of

# What attention modules call the numbers that follow from how many heads they have.
_COUNTS = ("num_attention_heads", "num_heads")
_KEY_COUNTS = ("num_key_value_heads",)


def block_anatomy(block: nn.Module) -> Anatomy:
    """Return which of a block's layers do what.

    Raises:
        ValueError: they are laid out like none of those that are known.
    """
    return anatomy_of(block.state_dict())


def signature(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return a block's tensors and their shapes; two blocks with the same can stand in each other's place."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())


def drop_blocks(network: nn.Module, kept: Sequence[int]) -> list[str] | None:
    """Leave only some of a network's blocks, in their order; its config then says so.

    Returns:
        The kind of each block that is left, where the architecture has several kinds: its config's `layer_types`.

    Raises:
        ValueError: a block would come to stand where the architecture has one with other tensors.
    """
    path, blocks = blocks_of(network)
    for place, number in enumerate(kept):
        if signature(blocks[place]) != signature(blocks[number]):
            raise ValueError(f"{path}.{place} has other tensors than {path}.{number}, which cannot stand in its place; keep it")
    config = backbone_of(network).config
    types = getattr(config, "layer_types", None)
    left = None if types is None else [types[number] for number in kept]
    network.set_submodule(path, nn.ModuleList([blocks[number] for number in kept]))
    config.num_hidden_layers = len(kept)  # type: ignore[union-attr]
    if left is not None:
        config.layer_types = left  # type: ignore[union-attr]
    return left


def drop_sublayer(block: nn.Module, sublayer: Sublayer) -> None:
    """Take the attention or the MLP out of a block.

    Raises:
        ValueError: its layers are laid out like none of those that are known.
    """
    for name, stand_in in block_anatomy(block).replacements[sublayer].items():
        block.set_submodule(name, STAND_INS[stand_in]())


@contextmanager
def without(block: nn.Module, sublayers: Sequence[Sublayer]) -> Iterator[nn.Module]:
    """Run a block without some of its sublayers for a while."""
    if not sublayers:
        yield block
        return
    anatomy = block_anatomy(block)
    names = [name for sublayer in sublayers for name in anatomy.replacements[sublayer]]
    own = {name: block.get_submodule(name) for name in names}
    try:
        for sublayer in sublayers:
            for name, stand_in in anatomy.replacements[sublayer].items():
                block.set_submodule(name, STAND_INS[stand_in]())
        yield block
    finally:
        for name, module in own.items():
            block.set_submodule(name, module)


def take(linear: nn.Linear, *, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
    """Leave only some of a layer's outputs (`rows`, int64) or inputs (`columns`)."""
    weight = linear.weight.data
    if rows is not None:
        weight = weight[rows]
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.data[rows].clone(), requires_grad=False)
    if columns is not None:
        weight = weight[:, columns]
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    linear.out_features, linear.in_features = weight.shape


def head_width(block: nn.Module, anatomy: Anatomy) -> int:
    """Return how wide a head of a block's attention is."""
    attention = _attention(block, anatomy)
    found = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size")  # noqa: B009  not typed
    return int(found)


def count_heads(block: nn.Module, anatomy: Anatomy, heads: int, key_heads: int) -> None:
    """Tell a block's attention how many heads its layers have."""
    attention = _attention(block, anatomy)
    counts = dict.fromkeys(_COUNTS, heads) | dict.fromkeys(_KEY_COUNTS, key_heads)
    counts |= {"num_key_value_groups": heads // key_heads, "all_head_size": heads * head_width(block, anatomy)}
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)


def keep_heads(network: nn.Module, heads: int) -> None:
    """Make room for fewer heads in a network without values whose config cannot say how many there are."""
    for block in blocks_of(network)[1]:
        anatomy = block_anatomy(block)
        if f"{anatomy.output}.weight" in block.state_dict():
            width = heads * head_width(block, anatomy)
            for name in anatomy.attention:
                _resize(block, name, out_features=width)
            _resize(block, anatomy.output, in_features=width)
            count_heads(block, anatomy, heads, heads)


def _attention(block: nn.Module, anatomy: Anatomy) -> nn.Module:
    return block.get_submodule(anatomy.attention[0].rpartition(".")[0])


def _resize(block: nn.Module, name: str, out_features: int | None = None, in_features: int | None = None) -> None:
    old = block.get_submodule(name)
    assert isinstance(old, nn.Linear)
    sizes = (in_features or old.in_features, out_features or old.out_features)
    block.set_submodule(name, nn.Linear(*sizes, bias=old.bias is not None, device="meta").requires_grad_(False))
