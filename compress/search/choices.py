"""The table of choices: what can be done to a group of layers, each as a step of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress.common.errors import UserError, nearest
from compress.methods import method_class
from compress.methods.base import Method
from compress.models.architectures import place_in_block
from compress.models.shape import ModelShape
from compress.runtimes.contract import GRAPH_RUNTIMES, runtime_named
from compress.search.groups import HEAD, TABLE, WHOLE, Group

AS_STORED = "float16"
"""The choice of leaving a group as a variant stores it."""
DROPPED = "dropped"


@dataclass(frozen=True)
class Choice:
    """Something that can be done to a group of layers."""

    name: str
    step: Mapping[str, Any] | None
    """The step that does it; None: nothing is done."""
    targets: tuple[str, ...]
    """Which groups it is for: `linears`, `table`, `block`."""
    what: str
    """What it does, for people."""
    alone: bool = True
    """Whether it replaces the group's own layers and changes nothing else, so that choices of one block can be combined."""
    graphs: bool | None = None
    """Whether it is for runtimes of graphs only (True) or for torch only (False); None: wherever the runtime executes it."""


def _gptq(bits: int, group: int | None = 64, symmetric: bool = False) -> dict[str, Any]:
    return {"method": "gptq", "bits": bits, "group_size": group, "symmetric": symmetric}


def _table(bits: int, group: int | None = 64) -> dict[str, Any]:
    return {"method": "embeddings", "bits": bits, "group_size": group}


_STATIC = {"method": "smoothquant", "activations": "static_per_tensor"}
_DYNAMIC = {"method": "rtn", "bits": 8, "activations": "dynamic_per_token"}
CHOICES = (
    Choice(AS_STORED, None, ("linears", "table", "block"), "left in half precision"),
    Choice("w8a8", _DYNAMIC, ("linears",), "int8 weights and activations, scaled token by token", graphs=False),
    Choice("w8a8-static", _STATIC, ("linears",), "int8 weights and activations, scaled by calibration", alone=False, graphs=True),
    Choice("fp8", {"method": "fp8"}, ("linears",), "E4M3 weights and activations", graphs=False),
    Choice("int8", _gptq(8, None, True), ("linears",), "int8 weights"),
    Choice("int6", _gptq(6), ("linears",), "6-bit weights in groups of 64 by GPTQ"),
    Choice("int5", _gptq(5), ("linears",), "5-bit weights in groups of 64 by GPTQ"),
    Choice("int4", _gptq(4), ("linears",), "4-bit weights in groups of 64 by GPTQ"),
    Choice("int3", _gptq(3), ("linears",), "3-bit weights in groups of 64 by GPTQ"),
    Choice("int2", _gptq(2), ("linears",), "2-bit weights in groups of 64 by GPTQ"),
    Choice("sparse-50", {"method": "sparsegpt"}, ("linears",), "half of the weights zero by SparseGPT", graphs=False),
    Choice("int8", _table(8, None), ("table",), "int8 rows"),
    Choice("int4", _table(4), ("table",), "4-bit values in groups of 64"),
    Choice("int3", _table(3), ("table",), "3-bit values in groups of 64"),
    Choice("int2", _table(2), ("table",), "2-bit values in groups of 64"),
    Choice("channels-50", {"method": "width", "channels": 0.5}, ("block",), "half of the MLP channels, refitted"),
    Choice("heads-50", {"method": "width", "heads": 0.5}, ("block",), "half of the attention heads, refitted"),
    Choice(DROPPED, {"method": "depth", "drop": [0]}, ("block",), "the block left out"),
)
"""All choices. A new one is a row here; where its step is of a new kind, `assemble` says how the choices become a recipe."""


WIDTHS = tuple(choice.name for choice in CHOICES if choice.step is not None and choice.step["method"] == "width")
"""Names of the choices that make a block narrower."""


def target_of(group: Group) -> str:
    """Return which choices are for a group: `linears`, `table` or `block`."""
    return {TABLE: "table", WHOLE: "block"}.get(group.kind, "linears")


def choice_names() -> tuple[str, ...]:
    """Return the names of all choices."""
    return tuple(dict.fromkeys(choice.name for choice in CHOICES))


def check_choices(names: Sequence[str]) -> None:
    """See that choices exist.

    Raises:
        UserError: one does not; names the nearest.
    """
    for name in names:
        if name not in choice_names():
            raise UserError(f"choice {name!r} is not known", nearest(name, choice_names()))


def choices_for(group: Group, shape: ModelShape, runtime: str, names: Sequence[str] | None = None) -> tuple[Choice, ...]:
    """Return the choices that a runtime executes and that fit a group; leaving it as it is comes first.

    Args:
        group: the group.
        shape: the model's shape.
        runtime: the runtime that is to execute the variant.
        names: choices to consider; None: all. Leaving a group as it is is always one.
    """
    found = []
    for choice in CHOICES:
        offered = names is None or choice.name in names or choice.name == AS_STORED
        fits = choice.graphs is None or choice.graphs == (runtime in GRAPH_RUNTIMES)
        if offered and fits and target_of(group) in choice.targets and _executed(choice, group, shape, runtime):
            found.append(choice)
    return tuple(found)


def _executed(choice: Choice, group: Group, shape: ModelShape, runtime: str) -> bool:
    """Whether a choice's step fits the group, and the runtime executes what it makes."""
    step = step_of(choice, group, shape)
    if step is None:
        return True
    try:
        estimate = step.estimate(_whole(shape) if group.kind == WHOLE else part_of(shape, group))
    except ValueError:
        return False
    place, table = runtime_named(runtime), group.kind == TABLE
    return not any(
        place.overflows(layer) or place.refusal(name, layer, estimate.after.packed[name][1], table=table)
        for name, layer in estimate.quantized.items()
    )


def step_of(choice: Choice, group: Group, shape: ModelShape) -> Method | None:
    """Return the step that makes a choice for one group and leaves all other layers alone; None: nothing is done."""
    if choice.step is None:
        return None
    config = dict(choice.step)
    kind = method_class(config["method"])
    if config["method"] == "depth":
        assert group.block is not None
        return kind(**{**config, "drop": (shape.layers[group.block],)})
    if "skip" in kind.model_fields:
        config["skip"] = tuple(name for name in _neighbours(shape, group) if name not in group.layers)
        config["head"] = group.kind == HEAD
    return kind(**config)


def _neighbours(shape: ModelShape, group: Group) -> list[str]:
    """Return the linear layers of a group's segment: those of its block, or of the head."""
    if group.block is None:
        return list(shape.head_linears)
    return [name for name in shape.block_linears if (at := place_in_block(f"{name}.")) is not None and at[0] == group.block]


def part_of(shape: ModelShape, group: Group) -> ModelShape:
    """Return the shape of a group's segment alone, by which its costs are estimated."""

    def belongs(name: str) -> bool:
        at = place_in_block(name)
        if group.kind == TABLE:
            return name.startswith(f"{group.layers[0]}.")
        return at is not None and at[0] == group.block if group.block is not None else at is None

    return replace(shape, tensors={name: info for name, info in shape.tensors.items() if belongs(name)})


def _whole(shape: ModelShape) -> ModelShape:
    return replace(shape, tensors=dict(shape.tensors))


def narrowed(choice: Choice, group: Group, shape: ModelShape) -> ModelShape:
    """Return a model's shape after a choice for one block as a whole that leaves it there."""
    step = step_of(choice, group, shape)
    if step is None:
        return shape
    mine = part_of(step.estimate(_whole(shape)).after, group)
    return replace(shape, tensors={**shape.tensors, **mine.tensors})


def bytes_of(choice: Choice, group: Group, shape: ModelShape) -> int:
    """Return the bytes that a group's tensors take in a file after a choice; of a choice for a block, those that it then takes."""
    step = step_of(choice, group, shape)
    part = part_of(shape, group)
    if group.kind == WHOLE:
        if choice.name == DROPPED:
            return 0
        return part_of(narrowed(choice, group, shape), group).as_stored().bytes_in_file(("",))
    after = part.as_stored() if step is None else step.estimate(part).after
    return after.bytes_in_file(tuple(f"{name}." for name in group.layers))
