"""The inputs of a segment's linear layers on the calibration texts, token by token.

Padding never enters a statistic: padded rows are removed by the batch's mask before anything else sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compress.calibration.statistics import PS, S
from compress.calibration.texts import CalibrationTexts
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, Segment, module_in, replaced
from compress.models.network.walk import Carry

See = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with the first of the layers that share an input, the input's rows, float [n, in], and the weight of each, float32 [n]."""
SeeBoth = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called like `See`, and with the rows that the unchanged model has in their place, float [n, in]."""


class Inputs:
    """The calibration texts as they arrive at a segment."""

    def __init__(
        self, carry: Carry, texts: CalibrationTexts, index: int, segment: Segment, original: Original | None = None
    ) -> None:
        """Take a position of a walk.

        Args:
            carry: hidden states of the texts where the walk is.
            texts: the texts.
            index: the segment's number.
            segment: the segment.
            original: the segment and its inputs without the changes of the walk; None where no step asked for them.
        """
        self._carry, self._texts, self._index, self._segment = carry, texts, index, segment
        self.original = original

    def see(
        self, parts: Parts, layers: Mapping[str, nn.Module], receive: See, *, pooled_only: bool = False
    ) -> dict[str, tuple[str, ...]]:
        """Run the segment on all texts and pass on the inputs of its layers.

        Args:
            parts: the segment's modules.
            layers: modules inside of them, by name. Layers that get the same tensors form a group, which is named after the first.
            receive: called for each batch and each input of a group. Most layers have one. DeBERTa's query and key layers are
                called with the hidden states and with a table of relative positions, whose rows then count like tokens.
            pooled_only: weigh tokens as in their text's mean: a pooled token counts 1 / their number, others count nothing.

        Returns:
            The layers of each group, by its first layer.

        Raises:
            ValueError: a layer is never called, or its input is not finite.
        """
        groups: dict[str, list[str]] = {}
        caught_in = _Catcher(self.output, parts, layers)
        for batch in range(self.batches):
            caught = caught_in(batch)
            groups = groups or _grouped(caught)
            for leader in groups:
                for given in caught[leader]:
                    rows, counts = self._rows(given, batch, pooled_only)
                    _check_finite(leader, rows)
                    receive(leader, rows, counts)
        return {leader: tuple(names) for leader, names in groups.items()}

    def see_both(
        self, parts: Parts, layers: Mapping[str, nn.Module], receive: SeeBoth, *, pooled_only: bool = False
    ) -> dict[str, tuple[str, ...]]:
        """Run the segment, and the unchanged one with its own inputs, on all texts; see `see`, whose arguments it takes.

        Raises:
            ValueError: in addition, an earlier step changed the width of a layer's input.
        """
        assert self.original is not None, "a step that compares says so, and is then given the original"
        groups: dict[str, list[str]] = {}
        caught_in, exact_in = _Catcher(self.output, parts, layers), self.original.catcher(layers)
        for batch in range(self.batches):
            caught, exact = caught_in(batch), exact_in(batch)
            groups = groups or _grouped(caught)
            for leader in groups:
                for given, wanted in zip(caught[leader], exact[leader], strict=True):
                    if given.shape != wanted.shape:
                        raise ValueError(
                            f"the input of {leader} is {given.shape[-1]} wide, in the model that the step compares with "
                            f"{wanted.shape[-1]}: an earlier step changed it"
                        )
                    rows, counts = self._rows(given, batch, pooled_only)
                    others, _ = self._rows(wanted, batch, pooled_only)
                    _check_finite(leader, rows)
                    _check_finite(leader, others)
                    receive(leader, rows, counts, others)
        return {leader: tuple(names) for leader, names in groups.items()}

    def gather(
        self, parts: Parts, layers: Mapping[str, nn.Module], make: Callable[[int, torch.device], S], *, pooled_only: bool = False
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, S]]:
        """Gather a statistic of each input. `make` makes it from the input's width and device; see `see` for the other arguments.

        Returns:
            The layers of each group, and each group's statistic, both by the group's first layer.
        """
        found: dict[str, S] = {}

        def add(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
            if leader not in found:
                found[leader] = make(rows.shape[1], rows.device)
            found[leader].add(rows, counts)

        return self.see(parts, layers, add, pooled_only=pooled_only), found

    def gather_both(
        self, parts: Parts, layers: Mapping[str, nn.Module], make: Callable[[int, torch.device], PS], *, pooled_only: bool = False
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, PS]]:
        """Gather a statistic of each input and of the unchanged model's input in its place; see `gather`."""
        found: dict[str, PS] = {}

        def add(leader: str, rows: torch.Tensor, counts: torch.Tensor, exact: torch.Tensor) -> None:
            if leader not in found:
                found[leader] = make(rows.shape[1], rows.device)
            found[leader].add(rows, counts, exact)

        return self.see_both(parts, layers, add, pooled_only=pooled_only), found

    def groups(self, parts: Parts, layers: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
        """Return the names of layers that share an input, in the order in which the segment calls them.

        Raises:
            ValueError: a layer is never called.
        """
        caught = _Catcher(self.output, parts, layers)(self.batches - 1)
        return [tuple(names) for names in _grouped(caught).values()]

    @property
    def batches(self) -> int:
        """Number of batches of texts."""
        return len(self._texts.batches)

    def output(self, parts: Parts, batch: int) -> torch.Tensor:
        """Return the segment's output for a batch: hidden states [texts, length, width], or vectors if it is the head."""
        if self._segment.kind is not Kind.HEAD:
            return self._carry.through(self._index, parts, batch)
        network = self._carry.network
        assert network is not None, "the texts have come through the network by then"
        hidden = self._carry.hidden(batch)
        masks = (torch.from_numpy(x).to(hidden.device) for x in (self._texts.batches[batch][1], self._texts.pooled[batch]))
        with replaced(network, parts):
            vectors: torch.Tensor = head_of(network)(hidden, *masks)
        return vectors

    def tokens(self, parts: Parts, batch: int) -> torch.Tensor:
        """Return a block's output for the tokens of a batch, without padding: [tokens, width]."""
        hidden = self.output(parts, batch)
        return hidden[torch.from_numpy(self._texts.batches[batch][1]).to(hidden.device).bool()]

    def sample(self, parts: Parts) -> torch.Tensor:
        """Return the segment's output for the batch of the shortest texts: hidden states, or vectors if it is the head."""
        return self.output(parts, self.batches - 1)

    def _rows(self, given: torch.Tensor, batch: int, pooled_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of unmasked tokens [n, in] and their weights [n]; all rows of what is not of tokens.

        Those are inputs of the head, which are rows already, and tables of relative positions, which count as one more text.
        """
        mask = torch.from_numpy(self._texts.batches[batch][1]).to(given.device)
        if given.dim() == 2 or (given.shape[0] == 1 and given.shape[:2] != mask.shape):
            rows = given.reshape(-1, given.shape[-1])
            weight = 1 / len(rows) if pooled_only and given.dim() > 2 else 1.0
            return rows, torch.full((len(rows),), weight, device=given.device)
        if given.shape[:2] != mask.shape:
            raise ValueError(f"{self._segment.name}: a layer's input is {list(given.shape)}, its texts are {list(mask.shape)}")
        counts = mask.float()
        if pooled_only:
            pooled = torch.from_numpy(self._texts.pooled[batch]).to(given.device).float()
            counts = pooled / pooled.sum(dim=1, keepdim=True)
        chosen = counts > 0
        return given[chosen], counts[chosen]


def _check_finite(leader: str, rows: torch.Tensor) -> None:
    if not torch.isfinite(rows).all():
        raise ValueError(f"the input of {leader} on the calibration texts holds NaN or infinity")


@dataclass(frozen=True)
class Original:
    """A segment as a walk found it, and the calibration texts as the unchanged segments before it make them."""

    parts: Parts
    """The segment's modules, unchanged, in the dtype that calibration computes in."""
    inputs: Inputs

    def catcher(self, names: Iterable[str]) -> _Catcher:
        """Return what catches the inputs of the unchanged layers of these names."""
        return _Catcher(self.inputs.output, self.parts, {name: module_in(self.parts, name) for name in names})

    def tokens(self, batch: int) -> torch.Tensor:
        """Return the unchanged block's output for the tokens of a batch, without padding: [tokens, width]."""
        return self.inputs.tokens(self.parts, batch)


class _Catcher:
    """Catches the inputs of layers while their segment runs on one batch after another."""

    def __init__(self, run: Callable[[Parts, int], torch.Tensor], parts: Parts, layers: Mapping[str, nn.Module]) -> None:
        """`run`: runs the segment's modules on a batch, given its number; `layers`: modules inside of them, by name."""
        self._run, self._parts, self._layers = run, parts, layers
        self._calls = 0

    def __call__(self, batch: int) -> dict[str, list[torch.Tensor]]:
        """Return the inputs of each layer, in the order of its calls.

        Raises:
            ValueError: a layer is never called.
        """
        caught: dict[str, list[torch.Tensor]] = {}
        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.callback(layer.register_forward_pre_hook(_keeping(caught, name, self._calls)).remove)
            with suppress(_AllSeen):
                self._run(self._parts, batch)
        if missing := self._layers.keys() - caught.keys():
            raise ValueError(f"{sorted(missing)[0]} is never called when its segment runs")
        self._calls = sum(map(len, caught.values()))
        return caught


class _AllSeen(Exception):
    """Raised when every layer has its inputs, to skip the rest of the segment, above all a block's last and widest product."""


def _keeping(caught: dict[str, list[torch.Tensor]], name: str, calls: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Return a hook that keeps a layer's inputs; `calls`: number of calls of all layers, 0 where it is not known yet."""

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        caught.setdefault(name, []).append(given[0])
        if sum(map(len, caught.values())) == calls:
            raise _AllSeen

    return keep


def _grouped(caught: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, list[str]]:
    """Group layers that got the same tensors. All these tensors are alive, so no two share an address."""
    leaders: dict[Any, str] = {}
    groups: dict[str, list[str]] = {}
    for name, inputs in caught.items():
        leader = leaders.setdefault(tuple((given.data_ptr(), given.shape, given.stride()) for given in inputs), name)
        groups.setdefault(leader, []).append(name)
    return groups
