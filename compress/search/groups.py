"""Groups of layers that a search decides about together: queries, keys and values of a block, its output, its MLP's sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress.models.architectures import BLOCK, place_in_block
from compress.models.shape import ModelShape

TABLE, HEAD, WHOLE = "table", "head", "block"
"""Kinds of the groups that are not linear layers of a block: the token table, the folded head's layers, a block as a whole."""
Per = Literal["group", "layer"]
"""How fine a search decides: for layers that share an input together, or for each layer."""


class Group(BaseModel):
    """Layers that get the same choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int | None
    """Number of their block, from 0; None: the token table or the head."""
    kind: str
    """What they are: `qkv`, `o`, `up` (`gate_up` where there are two), `down`, `table`, `head`, `block`; or a layer's own name."""
    layers: tuple[str, ...]
    """Names of the layers in the network; of a whole block none."""
    parameters: int
    """Number of their weights."""

    @property
    def name(self) -> str:
        """Its name in records: `3.qkv`, `table`."""
        return self.kind if self.block is None else f"{self.block}.{self.kind}"


def groups_of(shape: ModelShape, per: Per = "group") -> tuple[Group, ...]:
    """Return a model's groups: those of each block and the block as a whole, then the token table, then the head's.

    Raises:
        ValueError: the model has no linear layers in blocks.
    """
    kinds = _kinds(shape)
    found: dict[tuple[int, str], list[str]] = {}
    for layer in shape.block_linears:
        place = place_in_block(f"{layer}.")
        assert place is not None, "a linear layer of a block is in one"
        inner = place[1].rstrip(".")
        found.setdefault((place[0], kinds.get(inner, inner) if per == "group" else inner), []).append(layer)
    if not found:
        raise ValueError(f"{shape.name} has no linear layers in blocks that are left to choose for")
    order = list(dict.fromkeys([*kinds.values(), *(kind for _, kind in found)])) if per == "group" else list(kinds)
    order += [kind for _, kind in found if kind not in order]
    sizes = {name: info.parameters for name, info in shape.block_linears.items()}
    groups = []
    for block in range(shape.blocks):
        own = sorted((kind for number, kind in found if number == block), key=order.index)
        groups += [_group(block, kind, found[block, kind], sizes) for kind in own]
        if own:
            whole = sum(group.parameters for group in groups if group.block == block)
            groups.append(Group(block=block, kind=WHOLE, layers=(), parameters=whole))
    if shape.token_table is not None:
        rows = shape.tensors[f"{shape.token_table}.weight"].parameters
        groups.append(Group(block=None, kind=TABLE, layers=(shape.token_table,), parameters=rows))
    if shape.head_linears:
        sizes = {name: info.parameters for name, info in shape.head_linears.items()}
        groups.append(_group(None, HEAD, list(shape.head_linears), sizes))
    return tuple(groups)


def _group(block: int | None, kind: str, layers: Sequence[str], sizes: Mapping[str, int]) -> Group:
    return Group(block=block, kind=kind, layers=tuple(layers), parameters=sum(sizes[layer] for layer in layers))


def _kinds(shape: ModelShape) -> dict[str, str]:
    """Return the kind of each layer by its name in a block; empty where the layout of the blocks is unknown."""
    try:
        anatomy = shape.anatomy
    except ValueError:
        return {}
    up = "up" if len(anatomy.up) == 1 else "gate_up"
    return {
        **dict.fromkeys(anatomy.attention, "qkv"),
        anatomy.output: "o",
        **dict.fromkeys(anatomy.up, up),
        anatomy.down: "down",
    }


def pattern_of(layer: str) -> str:
    """Return a pattern that matches a block's layer whatever stands before the blocks' name in a network: `*layers.3.mlp.up_proj`.

    A layer outside the blocks is its own pattern.
    """
    block = BLOCK.search(f"{layer}.")
    return layer if block is None else "*" + f"{layer}"[block.start() :].lstrip(".")
