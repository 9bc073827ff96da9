"""The knapsack's items: what each choice of each group takes, also in a block that is narrower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compress.models.shape import ModelShape
from compress.search.choices import AS_STORED, DROPPED, Choice, bytes_of, choices_for, narrowed
from compress.search.groups import WHOLE, Group
from compress.search.knapsack import Item

BYTES, MS = "bytes", "ms"
WHOLE_MODEL, FLOAT32 = "", "float32"
"""Names among the measured times: the whole model, and as it runs in float32 in torch."""
Choices = Mapping[Group, Sequence[Choice]]
"""The choices of every group."""


@dataclass(frozen=True)
class Setting:
    """What the layers of a group are where their block as a whole has one of some choices."""

    shape: ModelShape
    """The model's shape with such a block."""
    name: str = AS_STORED
    """The first of these choices."""
    given: tuple[str, frozenset[str]] | None = None
    """The block's group and these choices; None: all that it has."""

    def key(self, group: Group) -> str:
        """Return the name by which the group's times are kept: `3.up`, or `3.up of channels-50`."""
        return group.name if self.name == AS_STORED else f"{group.name} of {self.name}"


def settings_of(choices: Choices, shape: ModelShape) -> dict[Group, tuple[Setting, ...]]:
    """Return the settings of every group of layers, the model's own first.

    Args:
        choices: every group's choices.
        shape: the model's shape.
    """
    wholes = {whole.block: whole for whole in choices if whole.kind == WHOLE}
    shapes = {
        block: {choice.name: narrowed(choice, whole, shape) for choice in choices[whole] if choice.name != DROPPED}
        for block, whole in wholes.items()
    }
    found: dict[Group, tuple[Setting, ...]] = {}
    for group in choices:
        if group.kind == WHOLE:
            continue
        if group.block not in wholes:
            found[group] = (Setting(shape),)
            continue
        whole = wholes[group.block]
        alike: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for name, after in shapes[group.block].items():
            alike.setdefault(tuple(after.tensors[f"{layer}.weight"].shape for layer in group.layers), []).append(name)
        found[group] = tuple(
            Setting(
                shapes[group.block][names[0]],
                names[0],
                None if len(names) == len(choices[whole]) else (whole.name, frozenset(names)),
            )
            for names in alike.values()
        )
    return found


def items_of(choices: Choices, shape: ModelShape, runtime: str, times: Mapping[str, Mapping[str, float]] | None) -> list[Item]:
    """Return an item for every choice of every group in every setting, without its loss.

    Args:
        choices: every group's choices.
        shape: the model's shape.
        runtime: the runtime that is to execute the variant.
        times: milliseconds of each choice, by `Setting.key`; None: not measured.
    """
    settings = settings_of(choices, shape)
    items: list[Item] = []

    def add(group: Group, choice: Choice, size: int, key: str, given: tuple[str, frozenset[str]] | None = None) -> None:
        costs = {BYTES: float(size), MS: 0.0 if times is None else times.get(key, {}).get(choice.name, 0.0)}
        items.append(Item(group.name, choice.name, 0.0, costs, given))

    for group, offered in choices.items():
        if group.kind == WHOLE:
            for choice in offered:
                add(group, choice, _rest_of_block(choice, group, settings, shape), group.name)
            continue
        for setting in settings[group]:
            fitting = choices_for(group, setting.shape, runtime, [choice.name for choice in offered])
            for choice in offered:
                if choice in fitting:
                    add(group, choice, bytes_of(choice, group, setting.shape), setting.key(group), setting.given)
    return items


def _rest_of_block(choice: Choice, whole: Group, settings: Mapping[Group, Sequence[Setting]], shape: ModelShape) -> int:
    """Return the bytes of a block after a choice for it as a whole, without those of its groups of layers."""
    if choice.name == DROPPED:
        return 0
    after = narrowed(choice, whole, shape)
    layers = tuple(f"{layer}." for group in settings if group.block == whole.block for layer in group.layers)
    return bytes_of(choice, whole, shape) - after.as_stored().bytes_in_file(layers)
