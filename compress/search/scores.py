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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.calibration.inputs import Inputs
from compress.calibration.statistics import Hessian, Moments, S
from compress.calibration.texts import CalibrationTexts
from compress.common.errors import UserError
from compress.models.folder import ModelFolder
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, Segment, State, begin, leave_out, module_in, replace_module, segments_of
from compress.models.network.walk import Carry, Streamed, walk
from compress.models.opened import OpenModel, buffers_to, open_model
from compress.pipeline.stage import cast, compute_dtype, prepare_to_run
from compress.search.choices import AS_STORED, DROPPED, Choice, step_of
from compress.search.groups import HEAD, TABLE, WHOLE, Group
from compress.search.scored_texts import ScoredTexts
from compress.search.scoring import Scoring

Modules = dict[str, nn.Module]
"""Layers by their names in the network."""


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
    scored = ScoredTexts(scoring, looked_at, compute_dtype(model.weights.dtypes(), place))
    if not scoring.texts.forward:
        scored.prepare()
    visitor = _Visitor(scoring, model, scored)
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
    scored: ScoredTexts
    calibration: CalibrationTexts = field(init=False)
    carry: Carry = field(init=False)
    """Hidden states of the calibration texts, then of the scored ones."""
    _blocks: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.calibration = self.scoring.texts.calibration.batches(self.model.tokenizer, self.model.spec)
        batches = [*self.calibration.batches, *self.scored.texts.batches]
        self.carry = Carry(batches, self.scored.device, self.scoring.journal.folder / "texts")
        blocks = [index for index, segment in enumerate(segments_of(self.model.network)) if segment.kind is Kind.BLOCK]
        self._blocks = {index: number for number, index in enumerate(blocks)}

    def visit(self, index: int, segment: Segment, parts: Parts) -> None:
        """Score a segment's choices, and leave it as the variant that is looked at has it, ready to run."""
        for module in parts.values():
            module.to(self.scored.device)
            module.requires_grad_(False)
        for step in self.scoring.exact:
            step.apply(parts)
        cast(parts, self.scored.dtype)
        if segment.kind is Kind.BLOCK:
            found = self._block(index, segment, parts)
        elif segment.kind is Kind.EMBEDDINGS:
            found = self._table(parts)
        elif segment.kind is Kind.HEAD:
            found = self._head(index, segment, parts)
        else:
            found = {}
        self.scoring.journal.put(entry(index), found)
        prepare_to_run(parts, self.scored.dtype)

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
        prepare_to_run(base, self.scored.dtype)
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
            leave_out(number, self.carry.state(batch), self.scored.entered[batch - len(self.calibration.batches)][1])
            for batch in self._scored_batches()
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

    def _scored_batches(self) -> range:
        return range(len(self.calibration.batches), len(self.carry.batches))

    def _after(self, index: int, parts: Parts) -> list[State]:
        """Return what the scored batches have after a block, which is brought into the form that runs."""
        prepare_to_run(parts, self.scored.dtype)
        return [self.carry.state_after(index, parts, batch) for batch in self._scored_batches()]

    def _judge(self, index: int, number: int, base: Parts) -> Judge:
        """Return what turns the states after a block into a loss."""
        before = [self.carry.state_after(index, base, batch) for batch in self._scored_batches()]
        return self._judge_at(number + 1, before)

    def _judge_at(self, boundary: int, before: Sequence[State]) -> Judge:
        if self.scoring.texts.forward:
            return partial(self._measured, boundary)
        gradients = self.scored.at(boundary)

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

        after = self.scored.rest(list(states), boundary, len(self.scored.blocks))
        with torch.no_grad():
            vectors = [self.scored.finish(state.hidden, batch) for batch, state in enumerate(after)]
        loss = tangent(self._cosine_loss(vectors))
        return loss if self.scoring.around is None else loss - tangent(self._cosine_loss(self.scored.vectors))

    def _cosine_loss(self, vectors: Sequence[torch.Tensor]) -> float:
        pairs = zip(vectors, self.scored.originals, strict=True)
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
        prepare_to_run(parts, self.scored.dtype)
        network, segments = self.model.network, segments_of(self.model.network)
        made = []
        for batch in self.scored.texts.batches:
            ids, mask = (torch.from_numpy(x).to(self.scored.device) for x in batch)
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

        prepare_to_run(head, self.scored.dtype)
        first = len(self.calibration.batches)
        vectors = [self.scored.pooled(self.carry.hidden(batch), batch - first, head) for batch in self._scored_batches()]
        return tangent(self._cosine_loss(vectors))


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
