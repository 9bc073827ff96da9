"""The calibration texts as the model has them without the changes of a walk, next to the walk that makes the changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.calibration.inputs import Inputs, Original
from compress.calibration.texts import CalibrationTexts
from compress.models.network.segments import Kind, Parts, Segment, segments_of
from compress.models.network.walk import Carry


class Originals:
    """Takes the calibration texts through a model that nothing changes, up to the segment where the changing walk is.

    They follow that walk: its carry moves on from a segment first, and this one when the next segment is asked for. A walk that
    was killed therefore finds this carry at its own segment or at the one before, and both go on from there. The price is that
    each block is read twice.
    """

    def __init__(self, network: nn.Module, texts: CalibrationTexts, load: Callable[[Segment], Parts], carry: Carry) -> None:
        """Combine what the walk needs.

        Args:
            network: the network of the walk.
            texts: the calibration texts.
            load: returns a segment's modules as they are stored, ready to run.
            carry: hidden states of the texts, of this walk only.
        """
        self._network, self._texts, self._load, self._carry = network, texts, load, carry
        self._segments = segments_of(network)

    @torch.no_grad()
    def at(self, index: int) -> Original:
        """Bring the texts to a block, and return it. `index`: the number of its segment, no lower than at the call before."""
        carry, segment = self._carry, self._segments[index]
        assert segment.kind is Kind.BLOCK, "other segments have no linear layers that can be followed"
        if carry.network is None:
            carry.enter(self._network, self._segments, self._load(self._segments[0]))
        while carry.passed < index:
            carry.advance(carry.passed, self._load(self._segments[carry.passed]))
        return Original(self._load(segment), Inputs(carry, self._texts, index, segment))
