"""Hidden states of a teacher and of what is left of it, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.methods.distill.objectives import hidden
from compress.models.network.pooling import backbone_of
from compress.models.network.segments import blocks_of


def followed(kept: Sequence[int], blocks: int) -> dict[int, int]:
    """Say which of the teacher's blocks each of the student's is to be like.

    The last one before the student's next block: that block then sees what it saw in the teacher.

    Args:
        kept: the student's blocks by their numbers in the teacher.
        blocks: how many the teacher has.

    Returns:
        By the student's own numbers.
    """
    ends = [*(number - 1 for number in kept[1:]), blocks - 1]
    return dict(enumerate(ends))


class HiddenStates:
    """The loss between a student's hidden states and those of its teacher, which is run for it on the same tokens."""

    def __init__(self, student: nn.Module, teacher: nn.Module, follows: Mapping[int, int], weight: float) -> None:
        """Take two networks, which of the teacher's blocks each of the student's follows, and what the loss counts."""
        self._student, self._teacher = student, teacher.eval().requires_grad_(False)
        self._follows, self._weight = follows, weight
        self._seen: dict[int, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the student's blocks give while it runs."""
        with _kept(self._student, self._follows.keys(), self._seen):
            yield

    def loss(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the loss for what the student was last given, int64 [texts, length] twice."""
        theirs: dict[int, torch.Tensor] = {}
        with torch.no_grad(), _kept(self._teacher, self._follows.values(), theirs):
            backbone_of(self._teacher)(input_ids=ids, attention_mask=mask)
        ours = [self._seen[number] for number in self._follows]
        return self._weight * hidden(ours, [theirs[number] for number in self._follows.values()], mask)


@contextmanager
def _kept(network: nn.Module, numbers: Any, into: dict[int, torch.Tensor]) -> Iterator[None]:
    """Keep what some blocks of a network give while it runs."""

    def keeping(number: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            into[number] = output[0] if isinstance(output, tuple) else output

        return keep

    blocks = blocks_of(network)[1]
    hooks = [blocks[number].register_forward_hook(keeping(number)) for number in set(numbers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
