"""A network taken apart: embeddings, blocks, final norm, head. What a walk over a model goes through, one segment after another.

A block is run by itself exactly as its network would run it: `begin` lets the network's own forward call every block once, with the
blocks passing their input on, and keeps what each was given beside the hidden states (masks, rotary angles, whether attention is
causal). So no architecture's argument list is written down here, and a bidirectional decoder stays bidirectional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import nn

from compress.common.errors import UserError
from compress.models.network.pooling import backbone_of

# What common architectures call the norm between the last block and the output.
HEAD = "text_head"
"""Name of the head of a network of transformers; see `compress.models.network.pooling.attach_head`."""
FINAL_NORMS = ("norm", "final_norm", "ln_f", "final_layernorm", "final_layer_norm")

Parts = dict[str, nn.Module]
"""A segment's modules by their names in the network."""


class Kind(StrEnum):
    """What a segment is."""

    EMBEDDINGS = "embeddings"
    BLOCK = "block"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True)
class Segment:
    """A stretch of a network: the names of its modules."""

    kind: Kind
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name it for people."""
        return ", ".join(self.paths)

    def owns(self, tensor: str) -> bool:
        """Whether a tensor of the network lies in this segment."""
        return any(tensor.startswith(f"{path}.") for path in self.paths)


@dataclass(frozen=True)
class BlockArguments:
    """What a block is called with beside the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def segments_of(network: nn.Module) -> list[Segment]:
    """Take a network apart, in the order of its forward pass; segments without tensors are left out.

    Raises:
        UserError: its blocks are not a list of modules, or it has a tensor outside of every segment.
    """
    backbone = backbone_of(network)
    prefix = next(name for name, module in network.named_modules() if module is backbone)
    blocks_path = _blocks_path(backbone)
    steps = blocks_path.split(".")
    before: list[str] = []
    owner, owner_path = backbone, ""
    for step in steps:
        before += [f"{owner_path}{name}" for name, _ in owner.named_children() if name not in (step, HEAD)]
        owner, owner_path = owner.get_submodule(step), f"{owner_path}{step}."
    above = ".".join(steps[:-1])
    norms = [path for path in before if path.rpartition(".")[::2] in {(above, name) for name in FINAL_NORMS}]
    found = [
        (Kind.EMBEDDINGS, [_join(prefix, path) for path in before if path not in norms]),
        *((Kind.BLOCK, [_join(prefix, f"{blocks_path}.{index}")]) for index in range(len(owner))),  # type: ignore[arg-type]
        (Kind.NORM, [_join(prefix, path) for path in norms]),
        (Kind.HEAD, [name for name, _ in network.named_children() if name == HEAD or (prefix and name != prefix)]),
    ]
    segments = []
    for kind, paths in found:
        filled = tuple(path for path in paths if network.get_submodule(path).state_dict())
        if filled:
            segments.append(Segment(kind, filled))
    for tensor in network.state_dict():
        if not any(segment.owns(tensor) for segment in segments):
            raise UserError(f"{type(backbone).__name__} cannot be walked block by block: {tensor} lies outside of its segments")
    return segments


def token_table(parts: Parts) -> str | None:
    """Return the name of the token embedding table of a segment: of its tables the one with the most rows; None without any."""
    tables = {
        (_join(path, inner) if inner else path): module.num_embeddings
        for path, part in parts.items()
        for inner, module in part.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return max(tables, key=tables.__getitem__) if tables else None


def module_in(parts: Parts, name: str) -> nn.Module:
    """Return the module of a segment that has a name in the network: one of its parts, or one inside a part."""
    path = next(path for path in parts if f"{name}.".startswith(f"{path}."))
    return parts[path].get_submodule(name.removeprefix(path).removeprefix("."))


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def blocks_of(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of a network's list of blocks, and the list.

    Raises:
        UserError: its blocks are not a list of modules.
    """
    backbone = backbone_of(network)
    prefix = next(name for name, module in network.named_modules() if module is backbone)
    path = _join(prefix, _blocks_path(backbone))
    blocks = network.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    return path, blocks


def _blocks_path(backbone: nn.Module) -> str:
    count = int(backbone.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for path, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) == 1:
            return str(path)
    raise UserError(f"{type(backbone).__name__} cannot be walked block by block: it has no list of {count} blocks")


@contextmanager
def replaced(network: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the place of a network's own for a while."""
    own = {path: network.get_submodule(path) for path in parts}
    try:
        for path, module in parts.items():
            network.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            network.set_submodule(path, module)


@contextmanager
def _answering(modules: Mapping[nn.Module, Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Let functions answer in the place of modules' own forward for a while."""
    try:
        for module, function in modules.items():
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            del module.forward  # the instance's; the class's own shows again


def begin(
    network: nn.Module, segments: list[Segment], embeddings: Parts, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, list[BlockArguments]]:
    """Run a batch as far as the first block.

    Args:
        network: any of its parameters may be without values; they are not touched.
        segments: what `segments_of` said of it.
        embeddings: the modules of its embeddings, with values.
        ids: int64 [batch, length].
        mask: int64 [batch, length], 1 for tokens.

    Returns:
        Hidden states [batch, length, width], and what each block is called with besides.

    Raises:
        UserError: the network does something between or after its blocks that this walk does not know.
    """
    backbone, arguments, calls = backbone_of(network), [], []
    hidden: list[torch.Tensor] = []

    def block(*positional: Any, **named: Any) -> torch.Tensor:
        given: torch.Tensor = positional[0] if positional else named.pop("hidden_states")
        if hidden and given is not hidden[0]:
            raise UserError(f"{type(backbone).__name__} cannot be walked block by block: something happens between its blocks")
        hidden.append(given)
        arguments.append(BlockArguments(positional[1:], named))
        return given

    def norm(given: torch.Tensor) -> torch.Tensor:
        calls.append(given is hidden[0] if hidden else False)
        return given

    answers: dict[nn.Module, Callable[..., torch.Tensor]] = {}
    for segment in segments:
        if segment.kind in (Kind.BLOCK, Kind.NORM):
            answers |= {network.get_submodule(path): block if segment.kind is Kind.BLOCK else norm for path in segment.paths}
    norms = sum(len(segment.paths) for segment in segments if segment.kind is Kind.NORM)
    with replaced(network, embeddings), _answering(answers):
        output = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    if len(arguments) != len(answers) - norms or calls != [True] * norms or output is not hidden[0]:
        raise UserError(f"{type(backbone).__name__} cannot be walked block by block: it does more than run its blocks and a norm")
    return hidden[0], arguments


def run_block(block: nn.Module, hidden: torch.Tensor, arguments: BlockArguments) -> torch.Tensor:
    """Run a block as its network would: hidden states [batch, length, width] in and out."""
    output = block(hidden, *arguments.positional, **arguments.named)
    result: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return result


def replace_module(parts: Parts, name: str, module: nn.Module) -> None:
    """Put a module in the place of a part of a segment, or of one inside a part."""
    if name in parts:
        parts[name] = module
        return
    path = next(path for path in parts if name.startswith(f"{path}."))
    parts[path].set_submodule(name.removeprefix(f"{path}."), module)
