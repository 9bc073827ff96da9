"""A network's vectors after each of its blocks, as if it ended there: its final norm and its head follow each block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from compress.models.network.pooling import head_of, hidden_of
from compress.models.network.segments import Kind, begin, blocks_of, segments_of


class Exits:
    """The exits of a network: depth n is what its first n blocks give, through the norm and the head that all depths share."""

    def __init__(self, network: nn.Module, ids: torch.Tensor, tokens: torch.Tensor) -> None:
        """Find what comes after the blocks, and see on a batch that nothing else does.

        Args:
            network: a network with values, whose head takes the last block's output alone.
            ids: int64 [texts, length].
            tokens: int64 [texts, length], 1 for tokens.

        Raises:
            UserError: the network does more than run its blocks and a norm, so that what is kept of a block is not all there is.
        """
        segments = segments_of(network)
        modules = {kind: [path for one in segments if one.kind is kind for path in one.paths] for kind in Kind}
        with torch.no_grad():
            begin(network, segments, {path: network.get_submodule(path) for path in modules[Kind.EMBEDDINGS]}, ids, tokens)
        self._network = network
        self._finals = [network.get_submodule(path) for path in modules[Kind.NORM]]
        self.shallower = tuple(range(1, len(modules[Kind.BLOCK])))
        """The depths other than the whole network's."""

    def vectors(self, ids: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, depths: Sequence[int]) -> list[torch.Tensor]:
        """Embed a padded batch at several depths in one run of the network; see `compress.models.network.pooling.vectors_of`.

        Args:
            ids: int64 [texts, length].
            tokens: see `TextHead.forward`.
            pooled: see `TextHead.forward`.
            depths: numbers of blocks after which the network ends, fewer than it has.

        Returns:
            float32 [texts, dimension] for each of `depths`, and last the whole network's.
        """
        outputs: dict[int, torch.Tensor] = {}
        with kept_outputs(self._network, [depth - 1 for depth in depths], outputs):
            whole = hidden_of(self._network, ids, tokens)
        states = [outputs[depth - 1] for depth in depths]
        for final in self._finals:
            states = [final(hidden) for hidden in states]
        head = head_of(self._network)
        return [head(hidden, tokens, pooled) for hidden in (*states, whole)]


@contextmanager
def kept_outputs(network: nn.Module, numbers: Iterable[int], into: dict[int, torch.Tensor]) -> Iterator[None]:
    """Keep the outputs of some blocks of a network, by their numbers from 0, while it runs within a `with` block."""

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
