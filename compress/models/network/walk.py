"""Walks over a network's segments in order, either resident or streamed from its files, with or without texts.

A resident walk uses a network that is in memory. A streamed walk loads one segment at a time, so it needs the memory of one block
plus the hidden states of the texts, which can be on disk. Both give the same results, bit for bit: in both, the same modules run on
the same batches with the same arguments, in the same order (see `compress.models.network.segments`). They differ only in when the
weights are loaded.

A `Carry` takes texts through the walk. Between two segments it holds the hidden states of every batch, and what earlier blocks made
for later ones (T5's position bias). For the whole walk it holds the other arguments of each block (masks, rotary embeddings), which
the embeddings pass recorded once. Where the head averages the outputs of several blocks, it also holds their weighted sum, and the
mean takes the place of the hidden states before the head.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from compress.common.files import naming, sync_tree, write_text_atomic
from compress.common.inputs import read_as
from compress.models.files.weights import Weights
from compress.models.network.pooling import LayerMean, head_of
from compress.models.network.segments import (
    HEAD,
    BlockArguments,
    Kind,
    Output,
    Parts,
    Segment,
    State,
    begin,
    run_block,
    segments_of,
)
from compress.models.text.tokens import Batch

HIDDEN, TOTAL = "hidden", "total"
"""Names of the hidden states and of their weighted sum in a carry's files."""


class Source(Protocol):
    """The source of a walk's segments."""

    network: nn.Module
    """The network. A streamed one has its parameters on the meta device."""

    def load(self, segment: Segment) -> Parts:
        """Return a segment's modules, with values and ready to run."""
        ...


class Resident:
    """A network that is in memory. `load` returns its own modules, so changes to them change the network."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def load(self, segment: Segment) -> Parts:
        """Return the segment's modules."""
        return {path: self.network.get_submodule(path) for path in segment.paths}


class Streamed:
    """A network whose weights are read from its files, segment by segment. `load` returns copies; the network stays empty."""

    def __init__(self, network: nn.Module, weights: Weights, prepare: Callable[[nn.Module], nn.Module] | None = None) -> None:
        """Combine an empty network with its stored weights.

        Args:
            network: the network, with its parameters on the meta device.
            weights: the stored weights.
            prepare: converts a filled segment to the form that runs (device, dtype, packed weights). None keeps the weights as they
                are stored and memory-mapped, so that they take no memory of the process until they are changed.
        """
        self.network = network
        self._weights = weights
        self._prepare = prepare

    def load(self, segment: Segment) -> Parts:
        """Read the segment's weights into copies of its modules."""
        parts = {path: copy.deepcopy(self.network.get_submodule(path)) for path in segment.paths}
        for path, module in parts.items():
            self._weights.fill(module, path)
        if self._prepare is None:
            return parts
        holder = nn.ModuleList(parts.values())  # `prepare` may replace a part, and can do so only in a parent module
        self._prepare(holder)
        return dict(zip(parts, holder, strict=True))


class _Reached(BaseModel):
    """What a walk keeps of how far it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    passed: int = Field(ge=0)


class Carry:
    """Carries texts through the network during a walk, as the hidden states of each batch.

    Hidden states are kept in memory, or in a folder with one file per batch. In a folder they outlive the process: a walk that was
    killed continues after the last segment that all batches had passed. The other arguments of the blocks are kept in memory, and
    are recorded again when a walk continues.
    """

    STATE = "reached.json"

    def __init__(self, batches: Sequence[Batch], device: torch.device, folder: Path | None = None) -> None:
        """Start with batches of texts.

        Args:
            batches: the padded batches.
            device: device on which the segments run.
            folder: folder for the hidden states, created if missing; None keeps them in memory.
        """
        self.batches = batches
        self._device = device
        self._folder = folder
        self.network: nn.Module | None = None
        """The network of the walk; None before `enter`."""
        self._arguments: list[list[BlockArguments]] = []
        self._memory: dict[int, State] = {}
        self._block_number: dict[int, int] = {}
        self._state_number: dict[int, int] = {}
        self._layers: LayerMean | None = None
        self.passed = 0
        """Number of segments that all batches have passed."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / self.STATE).exists():
                self.passed = read_as(folder / self.STATE, _Reached, "run with --fresh to begin anew").passed

    def hidden(self, index: int) -> torch.Tensor:
        """Return the hidden states of a batch at the walk's current position, [texts, length, width]."""
        return self.state(index).hidden

    def state(self, index: int) -> State:
        """Return what a batch has at the walk's current position."""
        if self._folder is None:
            return self._memory[index]
        with safe_open(self._file(self.passed, index), framework="pt", device=str(self._device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        hidden, total = tensors.pop(HIDDEN), tensors.pop(TOTAL, None)
        return State(hidden, {Output.of(name): tensor for name, tensor in tensors.items()}, total)

    def enter(self, network: nn.Module, segments: list[Segment], embeddings: Parts, layers: LayerMean | None = None) -> None:
        """Run the embeddings on all batches and record the arguments of the blocks.

        A walk that continues from a folder needs only the arguments: its hidden states are further on already.

        Args:
            network: the network of the walk.
            segments: the network's segments.
            embeddings: the modules of its embeddings segment, with values.
            layers: what averages the blocks' outputs for the head, with values; None: it takes the last block's.

        Raises:
            UserError: see `begin`.
        """
        self.network, self._layers = network, layers
        blocks = [index for index, segment in enumerate(segments) if segment.kind is Kind.BLOCK]
        self._block_number = {index: number for number, index in enumerate(blocks)}
        norms = [index for index, segment in enumerate(segments) if segment.kind is Kind.NORM]
        last = norms[:1] or blocks[-1:]  # none in a static table
        self._state_number = {index: number for number, index in enumerate([*blocks[:-1], *last], start=1)}
        for batch, (ids, mask) in enumerate(self.batches):
            hidden, arguments = begin(network, segments, embeddings, *(torch.from_numpy(x).to(self._device) for x in (ids, mask)))
            self._arguments.append(arguments)
            if self.passed == 0:
                self._put(1, batch, self._with_sum(State(hidden, {}), 0, None))
        if self.passed == 0:
            self._arrive(1)

    def through(self, index: int, parts: Parts, batch: int) -> torch.Tensor:
        """Return the hidden states of one batch after a block or norm. The carry keeps its current position.

        Args:
            index: number of the segment, which must be the next one.
            parts: the segment's modules.
            batch: number of the batch.
        """
        return self.state_after(index, parts, batch).hidden

    def state_after(self, index: int, parts: Parts, batch: int) -> State:
        """Return all that one batch has after a block or norm; see `through`."""
        number, state = self._block_number.get(index), self.state(batch)
        if number is not None:
            (block,) = parts.values()
            return run_block(block, number, state, self._arguments[batch])
        hidden = state.hidden
        for module in parts.values():
            hidden = module(hidden)
        return State(hidden, {})

    def advance(self, index: int, parts: Parts) -> None:
        """Run all batches through a block or norm, and move the carry's position after it.

        Args:
            index: number of the segment, which must be the next one.
            parts: the segment's modules.
        """
        for batch in range(len(self.batches)):
            before = self.state(batch).total if self._layers is not None else None
            state = self.state_after(index, parts, batch)
            self._put(index + 1, batch, self._with_sum(state, self._state_number.get(index), before))
        self._arrive(index + 1)

    def _with_sum(self, state: State, number: int | None, before: torch.Tensor | None) -> State:
        """Return what is held of a batch: its state and the weighted sum for the head, or at the end the mean as hidden states.

        Args:
            state: the batch's state.
            number: its number as `LayerMean` counts; None: its hidden states do not count.
            before: the weighted sum of those before them; None: there is none.
        """
        if self._layers is None:
            return state
        total = before if number is None else self._layers.add(before, number, state.hidden)
        if number == self._layers.blocks:
            assert total is not None, "the last one always counts"
            return replace(state, hidden=self._layers.mean(total))
        return replace(state, total=total)

    def _file(self, passed: int, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{passed:04d}" / f"{index:06d}.safetensors"

    def _put(self, passed: int, index: int, state: State) -> None:
        if self._folder is None:
            self._memory[index] = state
        else:
            path = self._file(passed, index)
            # Copies of outputs: a block may hand on the tensor that it was given, and files hold no tensor twice.
            tensors = {mark.key: output.clone() for mark, output in state.outputs.items()}
            tensors |= {} if state.total is None else {TOTAL: state.total}
            with naming(path):
                path.parent.mkdir(exist_ok=True)
                save_file({name: tensor.contiguous() for name, tensor in {HIDDEN: state.hidden, **tensors}.items()}, path)

    def _arrive(self, passed: int) -> None:
        """Record that all batches have passed `passed` segments, and delete the hidden states of the position before."""
        # The state is written before the old files are deleted, so that a killed walk always finds a complete set.
        before, self.passed = self.passed, passed
        if self._folder is not None:
            sync_tree(self._folder / f"{passed:04d}")
            write_text_atomic(self._folder / self.STATE, json.dumps({"passed": passed}))
            shutil.rmtree(self._folder / f"{before:04d}", ignore_errors=True)


def _layers_of(source: Source) -> LayerMean | None:
    """Return what averages the blocks' outputs for a network's head, with values; None where the head takes the last block's."""
    if head_of(source.network).layers is None:
        return None
    (layers,) = source.load(Segment(Kind.HEAD, (f"{HEAD}.layers",))).values()
    assert isinstance(layers, LayerMean)
    return layers


Visit = Callable[[int, Segment, Parts], None]
"""A function to call at each segment with its number, the segment and its modules, which it may change or replace."""


@torch.no_grad()
def walk(source: Source, visit: Visit, carry: Carry | None = None, start: int = 0) -> None:
    """Visit the segments of a network in order.

    Each segment is loaded and visited. Then the batches of `carry` run through it with the visit's changes, so that a visit sees
    the hidden states that enter its segment, computed by the changed segments before it.

    Args:
        source: the source of the segments.
        visit: the function to call at each segment.
        carry: texts to take along; None for a walk without texts. They stop before the head.
        start: number of the first segment to visit. A carry that an earlier walk left on disk continues at its own position.

    Raises:
        UserError: the network cannot be split into segments, or cannot run block by block.
    """
    segments = segments_of(source.network)
    start = start if carry is None else carry.passed
    for index, segment in enumerate(segments):
        # A continued walk runs the embeddings again, without a visit, because the arguments of the blocks are not stored.
        entering = carry is not None and segment.kind is Kind.EMBEDDINGS
        if index < start and not entering:
            continue
        parts = source.load(segment)
        if index >= start:
            visit(index, segment, parts)
        if carry is not None and entering:
            carry.enter(source.network, segments, parts, _layers_of(source))
        elif carry is not None and segment.kind is not Kind.HEAD:
            carry.advance(index, parts)
        del parts  # frees the segment before the next one is loaded; otherwise two would be in memory
