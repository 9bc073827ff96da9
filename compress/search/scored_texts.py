"""Vectors of the scored texts, and gradients of them along random directions at every boundary between blocks.

The model is read block by block, and gradients are kept in files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.calibration.texts import CalibrationTexts
from compress.common.files import replacing
from compress.layers.compressed import CompressedLinear
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, Segment, State, begin, replace_module, replaced, run_block, segments_of
from compress.models.network.walk import Streamed
from compress.models.opened import OpenModel, buffers_to, open_model
from compress.pipeline.stage import cast, prepare_to_run
from compress.search.scoring import Scoring


class ScoredTexts:
    """The scored texts through the model that is looked at: their vectors, and gradients of random directions at every boundary."""

    def __init__(self, scoring: Scoring, model: OpenModel, dtype: torch.dtype) -> None:
        self.scoring, self.model, self.dtype = scoring, model, dtype
        self.device = torch.device(scoring.texts.device)
        self.segments = segments_of(model.network)
        self.blocks = [segment for segment in self.segments if segment.kind is Kind.BLOCK]
        self.folder = scoring.journal.folder / "gradients"
        self._source = Streamed(model.network, model.weights)

    def load(self, segment: Segment) -> Parts:
        """Read a segment in the form that runs."""
        parts = self._source.load(segment)
        for module in parts.values():
            module.to(self.device)
        cast(parts, self.dtype)
        # Integer products have no derivatives: their layers become plain ones with the same weights.
        for path, part in list(parts.items()):
            for inner, module in list(part.named_modules()):
                if isinstance(module, CompressedLinear):
                    replace_module(parts, f"{path}.{inner}" if inner else path, module.plain().to(self.dtype))
        prepare_to_run(parts, self.dtype)
        for module in parts.values():
            module.requires_grad_(False)
        return parts

    @cached_property
    def texts(self) -> CalibrationTexts:
        """The scored texts as batches."""
        return self.scoring.texts.scored.batches(self.model.tokenizer, self.model.spec)

    @cached_property
    def finish(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Maps the hidden states of a batch after the last block to unit vectors, float32 [texts, dimension]."""
        loaded = {segment.kind: self.load(segment) for segment in self.segments if segment.kind in (Kind.NORM, Kind.HEAD)}

        def vectors(hidden: torch.Tensor, batch: int) -> torch.Tensor:
            for norm in loaded.get(Kind.NORM, {}).values():
                hidden = norm(hidden)
            return self.pooled(hidden, batch, loaded.get(Kind.HEAD, {}))

        return vectors

    def pooled(self, hidden: torch.Tensor, batch: int, head: Parts) -> torch.Tensor:
        """Return the unit vectors of a batch's hidden states after the norm, float32 [texts, dimension]."""
        masks = (torch.from_numpy(x).to(hidden.device) for x in (self.texts.batches[batch][1], self.texts.pooled[batch]))
        with replaced(self.model.network, head):
            made = head_of(self.model.network)(hidden, *masks)
        return torch.nn.functional.normalize(made.float(), dim=1)

    def directions(self, dimension: int, batch: int) -> torch.Tensor:
        """Return the directions of a batch's texts, float32 [directions, texts, dimension]."""
        generator = torch.Generator().manual_seed(self.scoring.texts.seed * 1_000_003 + batch)
        count = len(self.texts.batches[batch][0])
        return torch.randn(self.scoring.texts.directions, count, dimension, generator=generator).to(self.device)

    @cached_property
    def originals(self) -> list[torch.Tensor]:
        """The original model's unit vectors of each batch; those of the model that is looked at where that is the original."""
        if self.scoring.around is None:
            return self.vectors
        model = open_model(self.scoring.source)
        buffers_to(model.network, self.device)
        original = ScoredTexts(dataclasses.replace(self.scoring, around=None), model, self.dtype)
        return original.vectors

    @cached_property
    def vectors(self) -> list[torch.Tensor]:
        """The unit vectors of each batch of the model that is looked at."""
        states = list(self._states())[-1]
        with torch.no_grad():
            return [self.finish(state.hidden, batch) for batch, state in enumerate(states)]

    @cached_property
    def entered(self) -> list[tuple[torch.Tensor, Any]]:
        """The hidden states that enter the first block, and the blocks' arguments, of each batch."""
        embeddings = self.load(next(segment for segment in self.segments if segment.kind is Kind.EMBEDDINGS))
        with torch.no_grad():
            return [
                begin(self.model.network, self.segments, embeddings, *(torch.from_numpy(x).to(self.device) for x in batch))
                for batch in self.texts.batches
            ]

    def _states(self) -> Iterator[list[State]]:
        """Yield what every batch has before each block and after the last one."""
        states = [State(hidden, {}) for hidden, _ in self.entered]
        yield states
        for number, segment in enumerate(self.blocks):
            states = self.rest(states, number, number + 1, segment)
            yield states

    @torch.no_grad()
    def rest(self, states: list[State], first: int, stop: int, segment: Segment | None = None) -> list[State]:
        """Run batches through blocks `first` to `stop` - 1."""
        for number in range(first, stop):
            (block,) = self.load(self.blocks[number]).values()
            states = [
                run_block(block, number, state, arguments) for state, (_, arguments) in zip(states, self.entered, strict=True)
            ]
        return states

    def path(self, boundary: int) -> Path:
        """Return the file of the gradients at a boundary: 0 before the first block, n after block n - 1."""
        return self.folder / f"{boundary:04d}.safetensors"

    def at(self, boundary: int) -> list[torch.Tensor]:
        """Return the gradients of each batch at a boundary, float32 [directions, texts, length, width]."""
        kept = load_file(self.path(boundary), device=str(self.device))
        return [kept[str(batch)] for batch in range(len(kept))]

    def prepare(self) -> None:
        """Write the gradients at every boundary, from the last to the first; those that are there are not made again."""
        if self.path(0).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        states = list(self._states())
        after = len(self.blocks)
        if not self.path(after).exists():
            self._keep(after, [self._of_vectors(state.hidden, batch) for batch, state in enumerate(states[after])])
        for number in reversed(range(after)):
            if self.path(number).exists():
                continue
            (block,) = self.load(self.blocks[number]).values()
            later = self.at(number + 1)
            self._keep(
                number, [self._through(block, number, state, later[batch], batch) for batch, state in enumerate(states[number])]
            )

    def _of_vectors(self, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the gradients of u^T v after the last block, for each direction u; around a variant also of -v0^T v."""
        hidden = hidden.detach().requires_grad_()
        made = self.finish(hidden, batch)
        wanted = self.directions(made.shape[1], batch)
        if self.scoring.around is not None:
            wanted = torch.cat((wanted, -self.originals[batch][None]))
        found = [torch.autograd.grad((made * one).sum(), hidden, retain_graph=True)[0] for one in wanted]
        return torch.stack(found).float()

    def _through(self, block: nn.Module, number: int, state: State, later: torch.Tensor, batch: int) -> torch.Tensor:
        """Carry gradients from a block's outputs to its inputs."""
        hidden = state.hidden.detach().requires_grad_()
        made = run_block(block, number, State(hidden, state.outputs), self.entered[batch][1]).hidden
        found = [torch.autograd.grad(made, hidden, one.to(made.dtype), retain_graph=True)[0] for one in later]
        return torch.stack(found).float()

    def _keep(self, boundary: int, gradients: Sequence[torch.Tensor]) -> None:
        with replacing(self.path(boundary)) as temporary:
            save_file({str(batch): gradient.contiguous() for batch, gradient in enumerate(gradients)}, temporary)
