"""The hidden-state loss between a teacher and the student that was pruned from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from compress.methods.distill.objectives import hidden
from compress.models.network.exits import kept_outputs
from compress.models.network.pooling import backbone_of


def followed(kept: Sequence[int], blocks: int) -> dict[int, int]:
    """Return which of the teacher's blocks each student block should match.

    It is the last one before the student's next kept block: that block then gets the input that it had in the teacher.

    Args:
        kept: the student's blocks by their numbers in the teacher.
        blocks: number of blocks of the teacher.

    Returns:
        The teacher's block for each student block, both numbered from 0.
    """
    ends = [*(number - 1 for number in kept[1:]), blocks - 1]
    return dict(enumerate(ends))


class HiddenStates:
    """The loss between a student's hidden states and its teacher's; the teacher runs on the same tokens to get them."""

    def __init__(self, student: nn.Module, teacher: nn.Module, follows: Mapping[int, int], weight: float) -> None:
        """`follows`: the teacher's block that each student block should match, by number; `weight`: weight of the loss."""
        self._student, self._teacher = student, teacher.eval().requires_grad_(False)
        self._follows, self._weight = follows, weight
        self._seen: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the outputs of the student's blocks while it runs."""
        with kept_outputs(self._student, self._follows.keys(), self._seen):
            yield

    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the loss for the student's last batch, given its ids and mask, int64 [texts, length] each."""
        theirs: dict[int, torch.Tensor] = {}
        with torch.no_grad(), kept_outputs(self._teacher, self._follows.values(), theirs):
            backbone_of(self._teacher)(input_ids=ids, attention_mask=mask)
        ours = [self._seen[number] for number in self._follows]
        return self._weight * hidden(ours, [theirs[number] for number in self._follows.values()], mask)
