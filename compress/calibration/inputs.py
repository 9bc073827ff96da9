"""The inputs of a segment's linear layers, token by token.

Padding never enters a statistic: rows are taken by the batch's mask before anything else sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
"""Told the layer that leads those with one input, its rows, float [n, in], and what each of them counts, float32 [n]."""


class Inputs:
    """The calibration texts as they arrive at a segment."""

    def __init__(self, carry: Carry, texts: CalibrationTexts, index: int, segment: Segment) -> None:
        """Take the texts where the walk has them."""
        self._carry, self._texts, self._index, self._segment = carry, texts, index, segment

    def see(
        self, parts: Parts, layers: Mapping[str, nn.Module], told: See, *, pooled_only: bool = False
    ) -> dict[str, tuple[str, ...]]:
        """Run the segment on all texts and tell what its layers are given.

        Args:
            parts: the segment's modules.
            layers: modules inside of them, by name. Those that are given one and the same tensor are told once, as the first.
            told: called for each batch and each such group.
            pooled_only: tokens count as much as in their text's mean: those that are pooled 1 / their number, others nothing.

        Returns:
            The layers of each group, by the one that leads it.

        Raises:
            ValueError: a layer is never called, or given something that is not finite.
        """
        groups: dict[str, list[str]] = {}
        for batch in range(len(self._texts.batches)):
            caught: dict[str, torch.Tensor] = {}
            with ExitStack() as hooks:
                for name, layer in layers.items():
                    hooks.callback(layer.register_forward_pre_hook(_keeping(caught, name, len(layers))).remove)
                with suppress(_AllSeen):
                    self._run(parts, batch)
            if not groups:
                groups = _grouped(caught)
                if missing := layers.keys() - caught.keys():
                    raise ValueError(f"{sorted(missing)[0]} is never called when its segment runs")
            for leader in groups:
                rows, counts = self._rows(caught[leader], batch, pooled_only)
                if not torch.isfinite(rows).all():
                    raise ValueError(f"the input of {leader} on the calibration texts holds NaN or infinity")
                told(leader, rows, counts)
        return {leader: tuple(names) for leader, names in groups.items()}

    def gather(
        self, parts: Parts, layers: Mapping[str, nn.Module], make: Callable[[int, torch.device], S], *, pooled_only: bool = False
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, S]]:
        """Gather a statistic of each input: `make` it from the input's width and device; see `see` for the rest.

        Returns:
            The layers of each group, and each group's statistic, both by the layer that leads it.
        """
        found: dict[str, S] = {}

        def told(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
            if leader not in found:
                found[leader] = make(rows.shape[1], rows.device)
            found[leader].add(rows, counts)

        return self.see(parts, layers, told, pooled_only=pooled_only), found

    def sample(self, parts: Parts) -> torch.Tensor:
        """Return what the segment answers for the batch of the shortest texts: hidden states, or vectors where it is the head."""
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
        """Return the rows of unmasked tokens [n, in] and their weights [n]; the head's inputs have no others."""
        if given.dim() == 2:
            return given, torch.ones(len(given), device=given.device)
        mask = torch.from_numpy(self._texts.batches[batch][1]).to(given.device)
        if given.shape[:2] != mask.shape:
            raise ValueError(f"{self._segment.name}: a layer's input is {list(given.shape)}, its texts are {list(mask.shape)}")
        counts = mask.float()
        if pooled_only:
            pooled = torch.from_numpy(self._texts.pooled[batch]).to(given.device).float()
            counts = pooled / pooled.sum(dim=1, keepdim=True)
        chosen = counts > 0
        return given[chosen], counts[chosen]


class _AllSeen(Exception):
    """Every layer has its input: the rest of the segment need not run, a block's last and widest product above all."""


def _keeping(caught: dict[str, torch.Tensor], name: str, count: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        caught[name] = given[0]
        if len(caught) == count:
            raise _AllSeen

    return keep


def _grouped(caught: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Put layers together that were given the same tensor; all of these are alive, so that no two share a place in memory."""
    leaders: dict[Any, str] = {}
    groups: dict[str, list[str]] = {}
    for name, given in caught.items():
        leader = leaders.setdefault((given.data_ptr(), given.shape, given.stride()), name)
        groups.setdefault(leader, []).append(name)
    return groups
