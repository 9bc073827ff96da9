"""From a choice for each group to an ordinary recipe: a few steps with `skip` and `overrides` that a person can read and change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.methods import method_class
from compress.methods.base import Method
from compress.models.architectures import block_path
from compress.models.shape import ModelShape, matching
from compress.search.choices import AS_STORED, DROPPED, Choice
from compress.search.groups import TABLE, WHOLE, Group, pattern_of

PRECISION = ("bits", "group_size", "symmetric")
"""Keys of a step that its overrides set for some layers."""
ORDER = ("depth", "width", "sparsegpt", "smoothquant", "rtn", "fp8", "gptq", "embeddings")
"""The order of the steps: what changes sizes first, and what quantizes the layers that are left last."""
Chosen = Mapping[str, str]
"""The name of the choice for each group, by the group's name."""


@dataclass
class _Wanted:
    """What the layers of a model are to become."""

    steps: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    """For each method, the step's config for each of its layers."""
    table: Mapping[str, Any] | None = None
    dropped: list[int] = field(default_factory=list)
    """Blocks that are left out, by their position."""
    narrow: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    """Width steps of single blocks, by their position."""


def steps_of(chosen: Chosen, choices: Mapping[Group, Sequence[Choice]], shape: ModelShape) -> tuple[Method, ...]:
    """Return the steps of a recipe that makes a choice for each group; a group that is not named is left as it is.

    Args:
        chosen: the choices.
        choices: every group's choices.
        shape: the model's shape.

    Raises:
        ValueError: a step does not fit the model.
    """
    wanted = _wanted(chosen, choices, shape)
    steps: list[Method] = []

    def add(method: str, **config: Any) -> None:
        nonlocal shape
        step = method_class(method)(method=method, **config)
        shape = step.estimate(shape).after
        steps.append(step)

    if wanted.dropped:
        add("depth", drop=tuple(shape.layers[block] for block in wanted.dropped))
    places = {
        old: new
        for new, old in enumerate(block for block in range(shape.blocks + len(wanted.dropped)) if block not in wanted.dropped)
    }
    if wanted.narrow:
        add("width", **_width({places[block]: step for block, step in wanted.narrow.items()}, shape))
    for method in ORDER:
        if method in wanted.steps:
            renamed = {_renamed(layer, places): config for layer, config in wanted.steps[method].items()}
            add(method, **_over_layers(renamed, shape))
    if wanted.table is not None:
        add("embeddings", **{key: value for key, value in wanted.table.items() if key != "method"})
    return tuple(steps)


def _wanted(chosen: Chosen, choices: Mapping[Group, Sequence[Choice]], shape: ModelShape) -> _Wanted:
    """Sort choices by the method that makes them."""
    wanted = _Wanted()
    for group, offered in choices.items():
        name = chosen.get(group.name, AS_STORED)
        step = next(choice for choice in offered if choice.name == name).step
        if group.kind == WHOLE and name == DROPPED:
            assert group.block is not None
            wanted.dropped.append(group.block)
        elif group.kind == WHOLE and step is not None:
            assert group.block is not None
            wanted.narrow[group.block] = step
        elif group.kind == TABLE:
            wanted.table = step
        elif step is not None:
            wanted.steps.setdefault(step["method"], {}).update(dict.fromkeys(group.layers, step))
    for layers in wanted.steps.values():
        for layer in list(layers):
            if _block_of(layer) in wanted.dropped:
                del layers[layer]
    wanted.steps = {method: layers for method, layers in wanted.steps.items() if layers}
    return wanted


def _block_of(layer: str) -> int | None:
    from compress.models.architectures import place_in_block

    place = place_in_block(f"{layer}.")
    return None if place is None else place[0]


def _renamed(layer: str, places: Mapping[int, int]) -> str:
    """Return a layer's name after blocks were left out."""
    from compress.models.architectures import renumbered

    block = _block_of(layer)
    return layer if block is None else renumbered(layer, places[block])


def _width(narrow: Mapping[int, Mapping[str, Any]], shape: ModelShape) -> dict[str, Any]:
    """Return the config of one step that narrows some blocks, each by a config of its own."""
    configs = {block: {key: value for key, value in step.items() if key != "method"} for block, step in sorted(narrow.items())}
    paths = {_block_of(layer): block_path(layer) for layer in shape.block_linears}
    first = next(iter(configs.values()))
    if configs.keys() == paths.keys() and all(config == first for config in configs.values()):
        return first
    return {"overrides": {pattern_of(str(paths[block])): config for block, config in configs.items()}}


def _over_layers(layers: Mapping[str, Mapping[str, Any]], shape: ModelShape) -> dict[str, Any]:
    """Return the config of one step over some layers, each with a config of its own.

    The most frequent config is the step's own; the others become overrides, and layers that are not named are skipped.
    """
    there = [*shape.block_linears, *shape.head_linears]
    configs = {layer: {key: value for key, value in config.items() if key != "method"} for layer, config in layers.items()}
    plain = {layer: tuple(sorted(config.items())) for layer, config in configs.items()}
    common = dict(Counter(plain.values()).most_common(1)[0][0])
    head = any(layer in shape.head_linears for layer in layers)
    seen = there if head else list(shape.block_linears)
    overrides: dict[str, dict[str, Any]] = {}
    for other in dict.fromkeys(plain.values()):
        if dict(other) != common:
            mine = [layer for layer in layers if plain[layer] == other]
            changed = {key: value for key, value in other if common.get(key) != value}
            overrides |= dict.fromkeys(patterns(mine, seen), changed)
    made = dict(common)
    skipped = patterns([name for name in seen if name not in layers], seen)
    return (
        made
        | ({"skip": skipped} if skipped else {})
        | ({"head": True} if head else {})
        | ({"overrides": overrides} if overrides else {})
    )


def patterns(wanted: Iterable[str], there: Sequence[str]) -> tuple[str, ...]:
    """Return few patterns that match these layers and no other that is there."""
    left, found = list(wanted), list[str]()
    allowed = set(left)
    while left:
        for pattern in _candidates(left[0], there):
            matched = matching(there, [pattern])
            if matched <= allowed:
                found.append(pattern)
                left = [name for name in left if name not in matched]
                break
    return tuple(found)


def _candidates(layer: str, there: Sequence[str]) -> list[str]:
    """Return patterns that match a layer, the widest first, its own name last."""
    own = pattern_of(layer)
    block = _block_of(layer)
    if block is None:
        return [own]
    inner = own.split(f".{block}.", 1)[1]
    parts = inner.split(".")
    everywhere = [f"*.{'.'.join(parts[:depth])}.*" for depth in range(1, len(parts))] + [f"*.{inner}"]
    stem = own[: len(own) - len(inner)]
    here = [f"{stem}*"] + [f"{stem}{'.'.join(parts[:depth])}.*" for depth in range(1, len(parts))] + [own]
    return [*everywhere, *here]
