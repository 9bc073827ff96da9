"""The inputs of a segment's linear layers on the calibration texts, token by token.

Padding never enters a statistic: padded rows are removed by the batch's mask before anything else sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn

from compress.calibration.statistics import S
from compress.calibration.texts import CalibrationTexts
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, Segment, replaced
from compress.models.network.walk import Carry

See = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Called with the first of the layers that share an input, the input's rows, float [n, in], and the weight of each, float32 [n]."""


class Inputs:
    """The calibration texts as they arrive at a segment."""

    def __init__(self, carry: Carry, texts: CalibrationTexts, index: int, segment: Segment) -> None:
        """`carry`: hidden states of the texts where the walk is; `index`: the segment's number."""
        self._carry, self._texts, self._index, self._segment = carry, texts, index, segment

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
        calls = 0
        for batch in range(len(self._texts.batches)):
            caught: dict[str, list[torch.Tensor]] = {}
            with ExitStack() as hooks:
                for name, layer in layers.items():
                    hooks.callback(layer.register_forward_pre_hook(_keeping(caught, name, calls)).remove)
                with suppress(_AllSeen):
                    self._run(parts, batch)
            if not groups:
                groups, calls = _grouped(caught), sum(map(len, caught.values()))
                if missing := layers.keys() - caught.keys():
                    raise ValueError(f"{sorted(missing)[0]} is never called when its segment runs")
            for leader in groups:
                for given in caught[leader]:
                    rows, counts = self._rows(given, batch, pooled_only)
                    if not torch.isfinite(rows).all():
                        raise ValueError(f"the input of {leader} on the calibration texts holds NaN or infinity")
                    receive(leader, rows, counts)
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

    def sample(self, parts: Parts) -> torch.Tensor:
        """Return the segment's output for the batch of the shortest texts: hidden states, or vectors if it is the head."""
        return self._run(parts, len(self._texts.batches) - 1)

    def _run(self, parts: Parts, batch: int) -> torch.Tensor:
        if self._segment.kind is not Kind.HEAD:
            return self._carry.through(self._index, parts, batch)
        network = self._carry.network
        assert network is not None, "the texts have come through the network by then"
        hidden = self._carry.hidden(batch)
        masks = (torch.from_numpy(x).to(hidden.device) for x in (self._texts.batches[batch][1], self._texts.pooled[batch]))
        with replaced(network, parts):
            vectors: torch.Tensor = head_of(network)(hidden, *masks)
        return vectors

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
