"""Splits a network into segments: embeddings, blocks, final norm, head. A walk visits them one after another.

A block runs by itself exactly as its network would run it. `begin` runs the network's own forward once, with each block replaced by
a function that records its arguments (masks, rotary embeddings, whether attention is causal) and returns its input. So this module
needs no argument list of any architecture, and a bidirectional decoder stays bidirectional. What a block computes for later blocks
(T5's position bias) is seen there too: a stand-in returns a mark for each other output, and a later block is given the mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from compress.common.errors import UserError
from compress.models.architectures import one_set_of_blocks
from compress.models.network.pooling import backbone_of

HEAD = "text_head"
"""Name of the head of a network of transformers; see `compress.models.network.pooling.attach_head`."""
FINAL = ("norm", "final_norm", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm", "embedding_projection")
"""What common architectures call the modules between the last block and the output, in the order in which they run: a norm, and
EmbeddingGemma 2's projection to the width of its vectors. `begin` sees whether a network really runs them like that."""

Parts = dict[str, nn.Module]
"""The modules of a segment, by their names in the network."""


class Kind(StrEnum):
    """The kind of a segment."""

    EMBEDDINGS = "embeddings"
    BLOCK = "block"
    NORM = "norm"
    HEAD = "head"


@dataclass(frozen=True)
class Segment:
    """A part of a network that is loaded and run as a unit."""

    kind: Kind
    """The kind of the segment."""
    paths: tuple[str, ...]
    """Names of the segment's modules in the network."""

    @property
    def name(self) -> str:
        """The segment's name in messages."""
        return ", ".join(self.paths)

    def owns(self, tensor: str) -> bool:
        """Whether the network's tensor of this name belongs to the segment."""
        return any(tensor.startswith(f"{path}.") for path in self.paths)


@dataclass(frozen=True)
class BlockArguments:
    """The arguments of a block's forward other than the hidden states."""

    positional: tuple[Any, ...]
    """The positional arguments after the hidden states."""
    named: Mapping[str, Any]
    """The keyword arguments."""

    @cached_property
    def marks(self) -> set[Output]:
        """The outputs of earlier blocks that are among them."""
        return _marks_in((self.positional, dict(self.named)))

    def given(self, outputs: Mapping[Output, Any]) -> BlockArguments:
        """Return the arguments with the marks replaced by what the blocks really returned."""
        if not self.marks:
            return self
        return BlockArguments(_unmarked(self.positional, outputs), _unmarked(dict(self.named), outputs))


@dataclass(frozen=True)
class Output:
    """A mark for what a block returns next to the hidden states, before the block has run."""

    block: int
    """The number of the block."""
    index: int
    """The number of the output, from 1: output 0 is the hidden states."""

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"output.{self.block}.{self.index}"

    @classmethod
    def of(cls, key: str) -> Output:
        """Return the mark of a name in a file."""
        _, block, index = key.split(".")
        return cls(int(block), int(index))


@dataclass(frozen=True)
class State:
    """What passes from one segment to the next."""

    hidden: torch.Tensor
    """The hidden states, [batch, length, width]."""
    outputs: Mapping[Output, torch.Tensor]
    """Other outputs of the blocks so far that a later block takes; empty for most architectures."""
    total: torch.Tensor | None = None
    """The weighted sum of the blocks' outputs so far, where the head averages them."""


def _marks_in(value: Any) -> set[Output]:
    """Return the marks inside an argument."""
    if isinstance(value, Output):
        return {value}
    inside = value.values() if type(value) is dict else value if type(value) in (tuple, list) else ()
    return {mark for one in inside for mark in _marks_in(one)}


def _unmarked(value: Any, outputs: Mapping[Output, Any]) -> Any:
    """Return an argument with its marks replaced."""
    if isinstance(value, Output):
        return outputs[value]
    if type(value) is dict:
        return {key: _unmarked(one, outputs) for key, one in value.items()}
    return type(value)(_unmarked(one, outputs) for one in value) if type(value) in (tuple, list) else value


def segments_of(network: nn.Module) -> list[Segment]:
    """Split a network into segments, in the order of its forward pass. Segments without tensors are left out.

    Raises:
        UserError: the blocks are not a list of modules, or a tensor belongs to no segment.
    """
    backbone = backbone_of(network)
    prefix = next(name for name, module in network.named_modules() if module is backbone)
    blocks_path = _blocks_path(backbone)
    steps = blocks_path.split(".")
    # Go down from the backbone to the list of blocks and collect the siblings at each level. A sibling of the list with the name of
    # a final norm is the norm; all others belong to the embeddings.
    before: list[str] = []
    owner, owner_path = backbone, ""
    for step in steps:
        before += [f"{owner_path}{name}" for name, _ in owner.named_children() if name not in (step, HEAD)]
        owner, owner_path = owner.get_submodule(step), f"{owner_path}{step}."
    above = ".".join(steps[:-1])
    norms = sorted(
        (path for path in before if path.rpartition(".")[::2] in {(above, name) for name in FINAL}),
        key=lambda path: FINAL.index(path.rpartition(".")[2]),
    )
    found = [
        (Kind.EMBEDDINGS, [_join(prefix, path) for path in before if path not in norms]),
        *((Kind.BLOCK, [_join(prefix, f"{blocks_path}.{index}")]) for index in range(len(owner))),  # type: ignore[arg-type]
        (Kind.NORM, [_join(prefix, path) for path in norms]),
        (Kind.HEAD, [name for name, _ in network.named_children() if name == HEAD or (prefix and name != prefix)]),
    ]
    # Modules without tensors (rotary embeddings, dropout) need no loading. Every tensor must be in a segment, or it would be lost.
    segments = []
    for kind, paths in found:
        filled = tuple(path for path in paths if network.get_submodule(path).state_dict())
        if filled:
            segments.append(Segment(kind, filled))
    for tensor in network.state_dict():
        if not any(segment.owns(tensor) for segment in segments):
            raise UserError(f"{type(backbone).__name__} cannot be walked block by block: {tensor} belongs to no segment")
    return segments


def token_table(parts: Parts) -> str | None:
    """Return the name of a segment's token embedding table, which is its table with the most rows; None if it has no table."""
    tables = {
        (_join(path, inner) if inner else path): module.num_embeddings
        for path, part in parts.items()
        for inner, module in part.named_modules()
        if isinstance(module, nn.Embedding)
    }
    return max(tables, key=tables.__getitem__) if tables else None


def module_in(parts: Parts, name: str) -> nn.Module:
    """Return a module of a segment by its name in the network: one of the parts, or a module inside one."""
    path = next(path for path in parts if f"{name}.".startswith(f"{path}."))
    return parts[path].get_submodule(name.removeprefix(path).removeprefix("."))


def _join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix else path


def blocks_of(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name of a network's list of blocks, and the list.

    Raises:
        UserError: the blocks are not a list of modules.
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
        # A static table has an empty list.
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(block) for block in module}) <= 1:
            return str(path)
    reason = one_set_of_blocks(backbone.config.to_dict()) or f"it has no list of {count} blocks"  # type: ignore[union-attr, operator]
    raise UserError(f"{type(backbone).__name__} cannot be walked block by block: {reason}")


@contextmanager
def replaced(network: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace modules of a network within a `with` block."""
    own = {path: network.get_submodule(path) for path in parts}
    try:
        for path, module in parts.items():
            network.set_submodule(path, module)
        yield
    finally:
        for path, module in own.items():
            network.set_submodule(path, module)


@contextmanager
def _forward_replaced(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward functions of modules within a `with` block."""
    try:
        for module, function in modules.items():
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module in modules:
            del module.forward  # removes the instance's attribute, so that the class's forward applies again


def begin(
    network: nn.Module, segments: list[Segment], embeddings: Parts, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, list[BlockArguments]]:
    """Run a batch up to the first block, and record the arguments of every block.

    The backbone's own forward runs, with its embeddings loaded. It computes masks and rotary embeddings and passes them to each
    block as it always does. The blocks are replaced by a function that records them, so no block needs weights.

    Args:
        network: the network; its parameters may be on the meta device and are not read.
        segments: the result of `segments_of` for this network.
        embeddings: the modules of its embeddings, with values.
        ids: int64 [batch, length].
        mask: int64 [batch, length], 1 for tokens.

    Returns:
        The hidden states that enter the first block, [batch, length, width], and the other arguments of each block.

    Raises:
        UserError: the backbone does more than run its blocks and a final norm, one after another.
    """
    first: Exception | None = None
    for form in (_FORMS[network],) if network in _FORMS else FORMS:
        try:
            found = _begin(network, segments, embeddings, (ids, mask), form)
        except (UserError, ValueError, TypeError, IndexError, AttributeError) as error:  # blocks of this network answer otherwise
            first = first or error
        else:
            _FORMS[network] = form
            return found
    assert first is not None
    if isinstance(first, UserError):
        raise first
    raise UserError(f"{type(backbone_of(network)).__name__} cannot be walked block by block: {first}") from first


Form = int
FORMS: tuple[Form, ...] = (0, 1, 2, 3, 4)
"""What a block's forward returns: 0: the hidden states; n: a tuple of n that begins with them, such as attention weights after
them. A form that is not the network's own is noticed: its next block is then not given what the first one got."""
_FORMS: WeakKeyDictionary[nn.Module, Form] = WeakKeyDictionary()
"""The form of each network that was walked, found with its first batch."""


def _begin(
    network: nn.Module,
    segments: list[Segment],
    embeddings: Parts,
    batch: tuple[torch.Tensor, torch.Tensor],
    form: Form,
) -> tuple[torch.Tensor, list[BlockArguments]]:
    """Do what `begin` says, for a network whose blocks answer in one of `FORMS`."""
    backbone, arguments, finals = backbone_of(network), list[BlockArguments](), list[str]()
    hidden: list[torch.Tensor] = []
    unlike = f"{type(backbone).__name__} cannot be walked block by block"

    def block(*positional: Any, **named: Any) -> Any:
        given: torch.Tensor = positional[0] if positional else named.pop("hidden_states")
        # Each block returns its input, so the next one must get the very same tensor. If not, the backbone changes hidden states
        # between blocks, which running the blocks one by one would miss.
        if (hidden and not _same(given, hidden[0])) or finals:
            raise UserError(f"{unlike}: something happens between its blocks")
        hidden.append(given)
        arguments.append(BlockArguments(positional[1:], named))
        return (given, *(Output(len(arguments) - 1, index) for index in range(1, form))) if form else given

    def final(path: str) -> Callable[[torch.Tensor], torch.Tensor]:
        def passed(given: torch.Tensor) -> torch.Tensor:
            finals.append(path if hidden and _same(given, hidden[0]) else f"{path} of something else")
            return given

        return passed

    # The final modules return their input too. So the backbone's output must be the tensor that entered the first block.
    answers: dict[nn.Module, Callable[..., Any]] = {}
    expected: list[str] = []
    for segment in segments:
        for path in segment.paths:
            if segment.kind is Kind.BLOCK:
                answers[network.get_submodule(path)] = block
            elif segment.kind is Kind.NORM:
                answers[network.get_submodule(path)] = final(path)
                expected.append(path)
    with replaced(network, embeddings), _forward_replaced(answers):
        output = backbone(input_ids=batch[0], attention_mask=batch[1]).last_hidden_state
    if not answers:  # a static table: its rows are the hidden states
        return output, []
    # Each block and each final module must have run exactly once, in order, with nothing after them.
    if len(arguments) != len(answers) - len(expected) or finals != expected or not _same(output, hidden[0]):
        raise UserError(f"{unlike}: it does more than run its blocks and a norm")
    return hidden[0], arguments


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or views of one that show the same numbers."""
    alike = one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()
    return one is other or (alike and one.dtype == other.dtype and one.numel() > 0)


def run_block(block: nn.Module, number: int, state: State, arguments: Sequence[BlockArguments]) -> State:
    """Run a block as its network would.

    Args:
        block: the block.
        number: its number.
        state: what arrives at it.
        arguments: those of all blocks of the network, as `begin` recorded them.

    Returns:
        The hidden states after it, of the same shape, and the outputs that later blocks take.
    """
    mine = arguments[number].given(state.outputs)
    answer = block(state.hidden, *mine.positional, **mine.named)
    returned = answer if isinstance(answer, tuple) else (answer,)
    made = {Output(number, index): output for index, output in enumerate(returned) if index}
    return State(returned[0], _wanted(arguments, number, {**state.outputs, **made}))


def leave_out(number: int, state: State, arguments: Sequence[BlockArguments]) -> State:
    """Return what arrives at the next block if a network lacks this block: there the block before it hands on its outputs.

    Raises:
        UserError: no block before it has made what later blocks take.
    """
    handed = dict(state.outputs)
    for mark in {mark for later in arguments[number + 1 :] for mark in later.marks if mark.block == number}:
        before = Output(number - 1, mark.index)
        if before not in handed:
            raise UserError(f"block {number} cannot be left out: later blocks take what it returns next to the hidden states")
        handed[mark] = handed[before]
    return State(state.hidden, _wanted(arguments, number, handed))


def _wanted(arguments: Sequence[BlockArguments], number: int, outputs: Mapping[Output, Any]) -> dict[Output, torch.Tensor]:
    """Return those outputs that blocks after this one take."""
    wanted = {mark for later in arguments[number + 1 :] for mark in later.marks}
    return {mark: output for mark, output in outputs.items() if mark in wanted}


def replace_module(parts: Parts, name: str, module: nn.Module) -> None:
    """Replace a module of a segment by its name in the network: one of the parts, or a module inside one."""
    if name in parts:
        parts[name] = module
        return
    path = next(path for path in parts if name.startswith(f"{path}."))
    parts[path].set_submodule(name.removeprefix(f"{path}."), module)
