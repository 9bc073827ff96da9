"""What each choice for each group of layers does to a model's vectors, on texts without labels.

A choice changes the hidden states after its block by dh. To first order it changes a text's vector v by J dh, J being the
derivative of the vector with respect to these hidden states, and 1 - cosine by |J dh|^2 / 2. With random directions u of unit
covariance, `E_u (u^T J dh)^2 = |J dh|^2`, and u^T J is the gradient of u^T v: one pass backwards serves all choices. dh is what
the choice really does, within its block without any approximation: its step is applied as a run would apply it, with the
calibration texts.

Both passes read the model block by block and keep what they have found, so that it need not fit in memory and may be killed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from compress.calibration.inputs import Inputs
from compress.calibration.statistics import Hessian, Moments, S
from compress.calibration.texts import CalibrationSource, CalibrationTexts
from compress.common.errors import UserError
from compress.common.files import replacing
from compress.common.journal import Journal
from compress.layers.compressed import CompressedLinear
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.network.pooling import head_of
from compress.models.network.segments import (
    Kind,
    Parts,
    Segment,
    State,
    begin,
    leave_out,
    module_in,
    replace_module,
    replaced,
    run_block,
    segments_of,
)
from compress.models.network.walk import Carry, Streamed, walk
from compress.models.opened import OpenModel, buffers_to, open_model
from compress.models.shape import ModelShape
from compress.pipeline.stage import cast, compute_dtype, prepare_to_run
from compress.search.choices import AS_STORED, DROPPED, Choice, step_of
from compress.search.groups import HEAD, TABLE, WHOLE, Group

Modules = dict[str, nn.Module]
"""Layers by their names in the network."""


@dataclass(frozen=True)
class Passages:
    """The texts of a scoring, and how they are looked at."""

    calibration: CalibrationSource
    """Texts that steps calibrate on."""
    scored: CalibrationSource
    """Other texts, on which vectors are compared."""
    directions: int = 8
    """Random directions in the space of the vectors, for each text."""
    forward: bool = False
    """Whether every choice is run through the rest of the model, instead of taking derivatives."""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Around:
    """A variant around which scores are taken; without one they are taken around the model as it is."""

    folder: Path
    """Folder of the variant."""
    chosen: Mapping[str, str]
    """The choice of each of its groups, by name. The variant differs from the model in nothing else."""


@dataclass(frozen=True)
class Scoring:
    """A model, its groups and their choices."""

    source: ModelFolder
    shape: ModelShape
    """Shape of the model after `exact`."""
    choices: Mapping[Group, Sequence[Choice]]
    texts: Passages
    journal: Journal
    """Keeps what is known of each segment."""
    exact: Sequence[Method] = ()
    """Steps that change nothing but rounding and come first: NV-Embed's fold."""
    around: Around | None = None
    say: Callable[[str], None] = print

    def of_block(self, block: int | None, *kinds: str) -> list[Group]:
        """Return the groups of a block, or those outside of the blocks, of certain kinds; without kinds all."""
        return [group for group in self.choices if group.block == block and (not kinds or group.kind in kinds)]

    def chosen(self, group: Group) -> str:
        """Return the choice around which a group's scores are taken."""
        return AS_STORED if self.around is None else self.around.chosen.get(group.name, AS_STORED)


def loss_of(changes: Sequence[Sequence[float]]) -> float:
    """Return the first-order loss of changes along random directions, `changes` [directions, texts]: E (u^T dv)^2 / 2."""
    return float(np.square(np.asarray(changes, dtype=np.float64)).mean()) / 2


def score(scoring: Scoring) -> dict[str, dict[str, float]]:
    """Return the loss of each choice of each group, by their names; see the module.

    A loss is 1 - cosine to first order, |dv|^2 / 2; measured ones (`forward`) are brought to the same scale, in which losses of
    independent choices add up (`compress.search.prediction`). Around a variant it is the change of the loss.

    Raises:
        UserError: the network cannot be walked, its head averages blocks, or a step does not fit.
    """
    model = open_model(scoring.source)
    if head_of(model.network).layers is not None:
        raise UserError(f"{scoring.source}: its head averages the outputs of its blocks, which a search does not follow")
    place = torch.device(scoring.texts.device)
    buffers_to(model.network, place)
    looked_at = model if scoring.around is None else _opened(scoring.around.folder, place)
    backward = _Backward(scoring, looked_at, compute_dtype(model.weights.dtypes(), place))
    if not scoring.texts.forward:
        backward.run()
    visitor = _Visitor(scoring, model, backward)
    segments = segments_of(model.network)
    if not all(scoring.journal.has(entry(index)) for index in range(len(segments))):
        walk(Streamed(model.network, model.weights), visitor.visit, visitor.carry)
    found: dict[str, dict[str, float]] = {}
    for index in range(len(segments)):
        for name, losses in scoring.journal.get(entry(index)).items():
            found.setdefault(name, {}).update(losses)
    return found


def entry(index: int) -> str:
    """Return the journal's key for the scores of a segment."""
    return f"scores {index}"


def _opened(folder: Path, place: torch.device) -> OpenModel:
    opened = open_model(ModelFolder(folder.name, folder))
    buffers_to(opened.network, place)
    return opened


class _Backward:
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
        network = self.model.network
        loaded = {segment.kind: self.load(segment) for segment in self.segments if segment.kind in (Kind.NORM, Kind.HEAD)}

        def vectors(hidden: torch.Tensor, batch: int, head: Parts | None = None) -> torch.Tensor:
            for norm in loaded.get(Kind.NORM, {}).values():
                hidden = norm(hidden)
            return self.pooled(hidden, batch, loaded.get(Kind.HEAD, {}))

        self._network = network
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
        original = _Backward(Scoring(**{**vars(self.scoring), "around": None}), model, self.dtype)
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

    def run(self) -> None:
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


class _Remembered(Inputs):
    """Inputs of a segment whose second moments and moments are gathered once, for all of its linear layers together."""

    def __init__(self, carry: Carry, texts: CalibrationTexts, index: int, segment: Segment, linears: Modules, parts: Parts) -> None:
        super().__init__(carry, texts, index, segment)
        self._all, self._untouched = linears, parts
        self._kept: dict[Any, tuple[dict[str, tuple[str, ...]], dict[str, Any]]] = {}

    def gather(
        self, parts: Parts, layers: Mapping[str, nn.Module], make: Callable[[int, torch.device], S], *, pooled_only: bool = False
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, S]]:
        """See `Inputs.gather`."""
        key = _key(make, pooled_only)
        if key is None or not set(layers) <= set(self._all):
            return super().gather(parts, layers, make, pooled_only=pooled_only)
        if key not in self._kept:
            self._kept[key] = super().gather(self._untouched, self._all, make, pooled_only=pooled_only)
        groups, statistics = self._kept[key]
        mine = {leader: tuple(name for name in names if name in layers) for leader, names in groups.items()}
        first = {leader: names for leader, names in mine.items() if names}
        return (
            {names[0]: names for names in first.values()},
            {names[0]: copy.deepcopy(statistics[leader]) for leader, names in first.items()},
        )


def _key(make: Any, pooled_only: bool) -> Any:
    """Return what a statistic of untouched inputs is known by; None for one that may be of changed inputs."""
    if make is Hessian:
        return "hessian", pooled_only
    if isinstance(make, partial) and make.func is Moments:
        return "moments", pooled_only, make.args, tuple(sorted(make.keywords.items()))
    return None


@dataclass
class _Visitor:
    """Scores the choices of one segment after another, as a walk with the calibration texts comes to it."""

    scoring: Scoring
    model: OpenModel
    backward: _Backward
    calibration: CalibrationTexts = field(init=False)
    carry: Carry = field(init=False)
    """Hidden states of the calibration texts, then of the scored ones."""
    _blocks: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.calibration = self.scoring.texts.calibration.batches(self.model.tokenizer, self.model.spec)
        batches = [*self.calibration.batches, *self.backward.texts.batches]
        self.carry = Carry(batches, self.backward.device, self.scoring.journal.folder / "texts")
        blocks = [index for index, segment in enumerate(segments_of(self.model.network)) if segment.kind is Kind.BLOCK]
        self._blocks = {index: number for number, index in enumerate(blocks)}

    def visit(self, index: int, segment: Segment, parts: Parts) -> None:
        """Score a segment's choices, and leave it as the variant that is looked at has it, ready to run."""
        for module in parts.values():
            module.to(self.backward.device)
            module.requires_grad_(False)
        for step in self.scoring.exact:
            step.apply(parts)
        cast(parts, self.backward.dtype)
        if segment.kind is Kind.BLOCK:
            found = self._block(index, segment, parts)
        elif segment.kind is Kind.EMBEDDINGS:
            found = self._table(parts)
        elif segment.kind is Kind.HEAD:
            found = self._head(index, segment, parts)
        else:
            found = {}
        self.scoring.journal.put(entry(index), found)
        prepare_to_run(parts, self.backward.dtype)

    # One segment

    def _block(self, index: int, segment: Segment, parts: Parts) -> dict[str, dict[str, float]]:
        """Score the choices of a block's groups."""
        number = self._blocks[index]
        groups = [group for group in self.scoring.of_block(number) if group.kind != WHOLE]
        linears = {name: module_in(parts, name) for group in groups for name in group.layers}
        untouched = copy.deepcopy(parts)
        inputs = _Remembered(self.carry, self.calibration, index, segment, linears, parts)
        made: dict[tuple[Group, str], Modules] = {}
        for group in groups:
            for choice in self.scoring.choices[group]:
                if choice.alone:
                    made[group, choice.name] = self._replaced(untouched, group, choice, inputs)
        for group in groups:
            _put(parts, made.get((group, self.scoring.chosen(group)), {}))
        base = copy.deepcopy(parts)
        prepare_to_run(base, self.backward.dtype)
        judge = self._judge(index, number, base)
        found: dict[str, dict[str, float]] = {}
        for group in groups:
            for choice in self.scoring.choices[group]:
                if choice.name == self.scoring.chosen(group):
                    found.setdefault(group.name, {})[choice.name] = 0.0
                elif choice.alone:
                    other = copy.deepcopy(parts)
                    _put(other, made[group, choice.name])
                    found.setdefault(group.name, {})[choice.name] = judge(self._after(index, other))
                elif self.scoring.around is None:
                    other = self._stepped(untouched, group, choice, inputs)
                    found.setdefault(group.name, {})[choice.name] = judge(self._after(index, other))
        if self.scoring.around is None:
            found |= self._whole(index, number, untouched, inputs, judge)
        return found

    def _whole(self, index: int, number: int, untouched: Parts, inputs: Inputs, judge: Judge) -> dict[str, dict[str, float]]:
        """Score the choices for a block as a whole."""
        found: dict[str, dict[str, float]] = {}
        for group in self.scoring.of_block(number, WHOLE):
            for choice in self.scoring.choices[group]:
                losses = found.setdefault(group.name, {})
                if choice.name == AS_STORED:
                    losses[choice.name] = 0.0
                elif choice.name == DROPPED:
                    losses[choice.name] = judge(self._left_out(number))
                else:
                    losses[choice.name] = judge(self._after(index, self._stepped(untouched, group, choice, inputs)))
        return found

    def _left_out(self, number: int) -> list[State]:
        return [
            leave_out(number, self.carry.state(batch), self.backward.entered[batch - len(self.calibration.batches)][1])
            for batch in self._scored()
        ]

    def _replaced(self, untouched: Parts, group: Group, choice: Choice, inputs: Inputs) -> Modules:
        """Return a group's layers as a choice makes them."""
        parts = self._stepped(untouched, group, choice, inputs)
        return {name: module_in(parts, name) for name in group.layers}

    def _stepped(self, untouched: Parts, group: Group, choice: Choice, inputs: Inputs | None) -> Parts:
        """Return a copy of a segment with a choice's step applied to a group."""
        parts = copy.deepcopy(untouched)
        step = step_of(choice, group, self.scoring.shape)
        if step is not None:
            try:
                step.apply(parts, inputs)
            except ValueError as error:
                raise UserError(f"{group.name}, {choice.name}: {error}") from error
        return parts

    def _scored(self) -> range:
        return range(len(self.calibration.batches), len(self.carry.batches))

    def _after(self, index: int, parts: Parts) -> list[State]:
        """Return what the scored batches have after a block, which is brought into the form that runs."""
        prepare_to_run(parts, self.backward.dtype)
        return [self.carry.state_after(index, parts, batch) for batch in self._scored()]

    def _judge(self, index: int, number: int, base: Parts) -> Judge:
        """Return what turns the states after a block into a loss."""
        before = [self.carry.state_after(index, base, batch) for batch in self._scored()]
        return self._judge_at(number + 1, before)

    def _judge_at(self, boundary: int, before: Sequence[State]) -> Judge:
        if self.scoring.texts.forward:
            return partial(self._measured, boundary)
        gradients = self.backward.at(boundary)

        def judge(states: Sequence[State]) -> float:
            changes = [
                torch.einsum("ktlw,tlw->kt", gradient, (state.hidden - old.hidden).float())
                for gradient, state, old in zip(gradients, states, before, strict=True)
            ]
            return self._loss(torch.cat(changes, dim=1))

        return judge

    def _loss(self, changes: torch.Tensor) -> float:
        """Return the loss of changes [directions, texts]; around a variant the last direction is what the loss falls along."""
        if self.scoring.around is None:
            return loss_of(changes.tolist())
        return float(changes[-1].double().mean()) + loss_of(changes[:-1].tolist())

    def _measured(self, boundary: int, states: Sequence[State]) -> float:
        """Return the measured loss of hidden states that run through the rest of the model."""
        from compress.search.prediction import tangent

        after = self.backward.rest(list(states), boundary, len(self.backward.blocks))
        with torch.no_grad():
            vectors = [self.backward.finish(state.hidden, batch) for batch, state in enumerate(after)]
        loss = tangent(self._cosine_loss(vectors))
        return loss if self.scoring.around is None else loss - tangent(self._cosine_loss(self.backward.vectors))

    def _cosine_loss(self, vectors: Sequence[torch.Tensor]) -> float:
        pairs = zip(vectors, self.backward.originals, strict=True)
        return 1 - float(torch.cat([(made * original).sum(dim=1) for made, original in pairs]).double().mean())

    def _table(self, parts: Parts) -> dict[str, dict[str, float]]:
        """Score the choices of the token table."""
        found: dict[str, dict[str, float]] = {}
        for group in self.scoring.of_block(None, TABLE):
            untouched = copy.deepcopy(parts)
            _put(parts, self._chosen_table(untouched, group))
            judge = self._judge_at(0, self._embedded(copy.deepcopy(parts)))
            for choice in self.scoring.choices[group]:
                if choice.name == self.scoring.chosen(group):
                    found.setdefault(group.name, {})[choice.name] = 0.0
                else:
                    made = self._embedded(self._stepped(untouched, group, choice, None))
                    found.setdefault(group.name, {})[choice.name] = judge(made)
        return found

    def _chosen_table(self, untouched: Parts, group: Group) -> Modules:
        choice = next(choice for choice in self.scoring.choices[group] if choice.name == self.scoring.chosen(group))
        parts = self._stepped(untouched, group, choice, None)
        return {name: module_in(parts, name) for name in group.layers}

    def _embedded(self, parts: Parts) -> list[State]:
        prepare_to_run(parts, self.backward.dtype)
        network, segments = self.model.network, segments_of(self.model.network)
        made = []
        for batch in self.backward.texts.batches:
            ids, mask = (torch.from_numpy(x).to(self.backward.device) for x in batch)
            made.append(State(begin(network, segments, parts, ids, mask)[0], {}))
        return made

    def _head(self, index: int, segment: Segment, parts: Parts) -> dict[str, dict[str, float]]:
        """Score the choices of the head's layers, by the vectors themselves."""
        found: dict[str, dict[str, float]] = {}
        inputs = Inputs(self.carry, self.calibration, index, segment)
        untouched = copy.deepcopy(parts)
        for group in self.scoring.of_block(None, HEAD):
            for choice in self.scoring.choices[group]:
                made = self._replaced(untouched, group, choice, inputs)
                if choice.name == self.scoring.chosen(group):
                    _put(parts, made)
                found.setdefault(group.name, {})[choice.name] = self._of_head(_with(untouched, made))
            kept = found[group.name][self.scoring.chosen(group)] if self.scoring.around is not None else 0.0
            found[group.name] = {name: loss - kept for name, loss in found[group.name].items()}
        return found

    def _of_head(self, head: Parts) -> float:
        from compress.search.prediction import tangent

        prepare_to_run(head, self.backward.dtype)
        first = len(self.calibration.batches)
        vectors = [self._pool(self.carry.hidden(batch), batch - first, head) for batch in self._scored()]
        return tangent(self._cosine_loss(vectors))

    def _pool(self, hidden: torch.Tensor, batch: int, head: Parts) -> torch.Tensor:
        masks = (
            torch.from_numpy(x).to(hidden.device)
            for x in (self.backward.texts.batches[batch][1], self.backward.texts.pooled[batch])
        )
        with replaced(self.model.network, head):
            made = head_of(self.model.network)(hidden, *masks)
        return torch.nn.functional.normalize(made.float(), dim=1)


Judge = Callable[[Sequence[State]], float]
"""Turns what the scored batches have after a segment into a loss."""


def _put(parts: Parts, modules: Mapping[str, nn.Module]) -> None:
    """Replace layers of a segment by copies of others."""
    for name, module in modules.items():
        replace_module(parts, name, copy.deepcopy(module))


def _with(parts: Parts, modules: Mapping[str, nn.Module]) -> Parts:
    """Return a copy of a segment with layers replaced."""
    made = copy.deepcopy(parts)
    _put(made, modules)
    return made
