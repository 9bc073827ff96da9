"""One walk over a network's segments: resident or streamed from its files, with or without texts carried along.

A streamed walk holds one segment in memory at a time and nothing else of the network, so it needs the memory of one block plus
the hidden states of the texts, which can lie on disk. It gives the same numbers as a resident one, bit for bit: the same modules
run with the same arguments (`compress.models.network.segments`), only their weights come and go.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from compress.common.files import write_text_atomic
from compress.models.files.weights import Weights
from compress.models.network.segments import BlockArguments, Kind, Parts, Segment, begin, run_block, segments_of
from compress.models.text.tokens import Batch


class Source(Protocol):
    """Where a walk gets segments from."""

    network: nn.Module

    def load(self, segment: Segment) -> Parts:
        """Return a segment's modules, with values and ready to run; changing them changes nothing else."""
        ...


class Resident:
    """A network that is in memory whole. What it hands out are its own modules."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def load(self, segment: Segment) -> Parts:
        """Return the segment's modules."""
        return {path: self.network.get_submodule(path) for path in segment.paths}


class Streamed:
    """A network whose weights are read from its files, segment by segment."""

    def __init__(self, network: nn.Module, weights: Weights, prepare: Callable[[nn.Module], nn.Module] | None = None) -> None:
        """Take a network without values and the weights to fill it from.

        `prepare`: brings a filled segment into the form that runs. Without it a segment has its weights as they are stored: mapped
        from their files, so that they take no memory of the process until they are changed.
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
        holder = nn.ModuleList(parts.values())  # what is prepared may be replaced, and so needs an owner
        self._prepare(holder)
        return dict(zip(parts, holder, strict=True))


class Carry:
    """The texts of a walk on their way through the network, batch by batch.

    Hidden states stay in memory, or lie in `folder`, one file a batch. There they outlive the process: a walk that was killed goes
    on behind the last segment through which all batches had come. Masks and what else blocks are called with stay in memory.
    """

    STATE = "reached.json"

    def __init__(self, batches: Sequence[Batch], device: torch.device, folder: Path | None = None) -> None:
        self.batches = batches
        self._device = device
        self._folder = folder
        self.network: nn.Module | None = None
        """The network that the texts go through, once they have entered it."""
        self._arguments: list[list[BlockArguments]] = []
        self._memory: dict[int, torch.Tensor] = {}
        self._block_number: dict[int, int] = {}
        self.passed = 0
        """Segments that all batches have come through."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / self.STATE).exists():
                self.passed = int(json.loads((folder / self.STATE).read_text(encoding="utf-8"))["passed"])

    def hidden(self, index: int) -> torch.Tensor:
        """Return the hidden states of a batch where the walk stands: [texts, length, width]."""
        if self._folder is None:
            return self._memory[index]
        with safe_open(self._file(self.passed, index), framework="pt", device=str(self._device)) as file:
            found: torch.Tensor = file.get_tensor("hidden")
        return found

    def enter(self, network: nn.Module, segments: list[Segment], embeddings: Parts) -> None:
        """Run the embeddings: hidden states where no earlier walk left any, and each block's arguments in any case."""
        self.network = network
        blocks = (index for index, segment in enumerate(segments) if segment.kind is Kind.BLOCK)
        self._block_number = {index: number for number, index in enumerate(blocks)}
        for batch, (ids, mask) in enumerate(self.batches):
            hidden, arguments = begin(network, segments, embeddings, *(torch.from_numpy(x).to(self._device) for x in (ids, mask)))
            self._arguments.append(arguments)
            if self.passed == 0:
                self._put(1, batch, hidden)
        if self.passed == 0:
            self._arrive(1)

    def through(self, index: int, parts: Parts, batch: int) -> torch.Tensor:
        """Run a batch through a block or norm, segment number `index`, where the walk stands; the batch itself stays there."""
        number = self._block_number.get(index)
        hidden = self.hidden(batch)
        for module in parts.values():
            hidden = module(hidden) if number is None else run_block(module, hidden, self._arguments[batch][number])
        return hidden

    def advance(self, index: int, parts: Parts) -> None:
        """Take all batches through a block or norm, segment number `index`."""
        for batch in range(len(self.batches)):
            self._put(index + 1, batch, self.through(index, parts, batch))
        self._arrive(index + 1)

    def _file(self, passed: int, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{passed:04d}" / f"{index:06d}.safetensors"

    def _put(self, passed: int, index: int, hidden: torch.Tensor) -> None:
        if self._folder is None:
            self._memory[index] = hidden
        else:
            path = self._file(passed, index)
            path.parent.mkdir(exist_ok=True)
            save_file({"hidden": hidden.contiguous()}, path)

    def _arrive(self, passed: int) -> None:
        """Note that every batch is through; where they were before is no longer needed."""
        before, self.passed = self.passed, passed
        if self._folder is not None:
            write_text_atomic(self._folder / self.STATE, json.dumps({"passed": passed}))
            shutil.rmtree(self._folder / f"{before:04d}", ignore_errors=True)


Visit = Callable[[int, Segment, Parts], None]
"""What is done at each segment: its number, itself and its modules, which may be changed or replaced."""


@torch.no_grad()
def walk(source: Source, visit: Visit, carry: Carry | None = None, start: int = 0) -> None:
    """Visit the segments of a network in order, from number `start` on.

    With `carry`, its batches run through each embeddings, block and norm segment after the visit, as the visit left it; a visit
    sees them as they enter the segment. A carry that an earlier walk left on disk goes on where it was, whatever `start` says.

    Raises:
        UserError: the network cannot be taken apart.
    """
    segments = segments_of(source.network)
    start = start if carry is None else carry.passed
    for index, segment in enumerate(segments):
        entering = carry is not None and segment.kind is Kind.EMBEDDINGS
        if index < start and not entering:
            continue
        parts = source.load(segment)
        if index >= start:
            visit(index, segment, parts)
        if carry is not None and entering:
            carry.enter(source.network, segments, parts)
        elif carry is not None and segment.kind is not Kind.HEAD:
            carry.advance(index, parts)
        del parts  # or it would live until the next segment is loaded, and there would be two
