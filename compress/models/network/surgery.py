"""Removes blocks, sublayers, heads and channels from a network. The result is a network of the same architecture without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compress.layers.dropped import STAND_INS
from compress.models.architectures import Anatomy, Sublayer, anatomy_of
from compress.models.network.pooling import backbone_of
from compress.models.network.segments import blocks_of

# Attributes in which attention modules keep their numbers of query heads and of key/value heads.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads")
_KEY_COUNTS = ("num_key_value_heads",)
# Attributes in which they keep the width of a head.
_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")


def block_anatomy(block: nn.Module) -> Anatomy:
    """Return the roles of a block's layers.

    Raises:
        ValueError: the layout of the block is unknown.
    """
    return anatomy_of(block.state_dict())


def signature(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return the names and shapes of a block's tensors. Blocks with equal signatures can replace each other."""
    return tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items())


def drop_blocks(network: nn.Module, kept: Sequence[int]) -> list[str] | None:
    """Keep only some of a network's blocks, and update its config.

    Args:
        network: the network.
        kept: numbers of the blocks to keep, in ascending order.

    Returns:
        The kinds of the kept blocks, if the architecture has several kinds (`layer_types` in the config); else None.

    Raises:
        ValueError: a block would move to a position where the architecture has a block with other tensors.
    """
    path, blocks = blocks_of(network)
    # When the smaller model is loaded, its architecture builds a block for each position: the tensors must fit that block. In
    # ModernBERT, for example, the first block has no attention norm.
    for place, number in enumerate(kept):
        if signature(blocks[place]) != signature(blocks[number]):
            raise ValueError(f"{path}.{place} has other tensors than {path}.{number}, which cannot take its position; keep it")
    config = backbone_of(network).config
    types = getattr(config, "layer_types", None)
    # Attention may be local or global by position; each block keeps its own kind.
    left = None if types is None else [types[number] for number in kept]
    network.set_submodule(path, nn.ModuleList([blocks[number] for number in kept]))
    config.num_hidden_layers = len(kept)  # type: ignore[union-attr]
    if left is not None:
        config.layer_types = left  # type: ignore[union-attr]
    return left


def drop_sublayer(block: nn.Module, sublayer: Sublayer) -> None:
    """Remove the attention or the MLP from a block. Stand-ins without weights replace its modules.

    Raises:
        ValueError: the layout of the block is unknown.
    """
    for name, stand_in in block_anatomy(block).replacements[sublayer].items():
        block.set_submodule(name, STAND_INS[stand_in]())


@contextmanager
def without(block: nn.Module, sublayers: Sequence[Sublayer]) -> Iterator[nn.Module]:
    """Remove sublayers of a block within a `with` block.

    Raises:
        ValueError: the layout of the block is unknown.
    """
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
    """Keep only some outputs or inputs of a linear layer.

    Args:
        linear: the layer, which is changed in place.
        rows: indices of the outputs to keep, int64; None keeps all.
        columns: indices of the inputs to keep, int64; None keeps all.
    """
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
    """Return the width of an attention head of a block."""
    attention = _attention(block, anatomy)
    return int(next(getattr(attention, name) for name in _WIDTHS if hasattr(attention, name)))


def count_heads(block: nn.Module, anatomy: Anatomy, heads: int, key_heads: int) -> None:
    """Set the numbers of heads of a block's attention, after its layers have been resized.

    Args:
        block: the block.
        anatomy: the roles of the block's layers.
        heads: number of query heads.
        key_heads: number of key/value heads.
    """
    # Attention modules copy these numbers from the config, so each attribute that the module has is set.
    attention = _attention(block, anatomy)
    counts = dict.fromkeys(_COUNTS, heads) | dict.fromkeys(_KEY_COUNTS, key_heads)
    counts |= {"num_key_value_groups": heads // key_heads, "all_head_size": heads * head_width(block, anatomy)}
    for name, count in counts.items():
        if hasattr(attention, name):
            setattr(attention, name, count)


def keep_heads(block: nn.Module, heads: int, key_heads: int | None = None) -> None:
    """Resize the attention of a block of an empty network to fewer heads, if it has its attention.

    This is for what a config cannot say: that heads are missing where it fixes the width of a head by their number, and that blocks
    have different numbers of heads.

    Args:
        block: a block with its parameters on the meta device.
        heads: number of query heads to keep.
        key_heads: number of heads of keys and values to keep; None: as many.

    Raises:
        ValueError: the layout of the block is unknown, or one layer makes its queries, keys and values.
    """
    anatomy, key_heads = block_anatomy(block), key_heads or heads
    if f"{anatomy.output}.weight" not in block.state_dict():
        return
    if len(anatomy.attention) == 1 or heads % key_heads:
        raise ValueError(f"its attention cannot have {heads} heads, and {key_heads} of keys and values")
    width = head_width(block, anatomy)
    for name, count in zip(anatomy.attention, (heads, key_heads, key_heads), strict=True):
        _resize(block, name, out_features=count * width)
    _resize(block, anatomy.output, in_features=heads * width)
    count_heads(block, anatomy, heads, key_heads)


def keep_channels(block: nn.Module, channels: int) -> None:
    """Resize the MLP of a block of an empty network to so many channels, if it has its MLP.

    Raises:
        ValueError: the layout of the block is unknown.
    """
    anatomy = block_anatomy(block)
    if f"{anatomy.down}.weight" not in block.state_dict():
        return
    for name in anatomy.up:
        _resize(block, name, out_features=anatomy.halves * channels)
    _resize(block, anatomy.down, in_features=channels)


def _attention(block: nn.Module, anatomy: Anatomy) -> nn.Module:
    return block.get_submodule(anatomy.attention[0].rpartition(".")[0])


def _resize(block: nn.Module, name: str, out_features: int | None = None, in_features: int | None = None) -> None:
    old = block.get_submodule(name)
    assert isinstance(old, nn.Linear)
    sizes = (in_features or old.in_features, out_features or old.out_features)
    block.set_submodule(name, nn.Linear(*sizes, bias=old.bias is not None, device="meta").requires_grad_(False))
