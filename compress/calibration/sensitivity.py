"""How sensitive a model is to each of its parts: what happens to texts if blocks or sublayers are left out.

The model is streamed, and what several cases have in common is computed once: each block is read once, and run once for every
different set of parts left out before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch

from compress.calibration.texts import CalibrationTexts
from compress.models.architectures import Sublayer
from compress.models.network.pooling import head_of
from compress.models.network.segments import Kind, Parts, State, begin, blocks_of, leave_out, replaced, run_block, segments_of
from compress.models.network.surgery import signature, without
from compress.models.network.walk import Streamed
from compress.models.opened import OpenModel

BlockPart = tuple[int, Literal["block"] | Sublayer]
"""A block by its number, or one of its sublayers."""
Left = frozenset[BlockPart]
"""Parts that are left out together."""

# Number of tokens whose hidden states are kept after every block, spread evenly over the texts.
SAMPLED_TOKENS = 1_024


class Survey:
    """A model and the texts to run through it."""

    def __init__(self, model: OpenModel, texts: Callable[[], CalibrationTexts], device: torch.device, dtype: torch.dtype) -> None:
        """`model`: its buffers are on `device`; `texts`: makes the batches; `dtype`: the dtype to compute in."""
        self.model = model
        self._make_texts = texts
        self.device = device
        self._segments = segments_of(model.network)
        self._source = Streamed(model.network, model.weights, lambda part: part.to(device, dtype))

    @cached_property
    def texts(self) -> CalibrationTexts:
        """The texts as batches."""
        return self._make_texts()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(blocks_of(self.model.network)[1])

    @property
    def droppable(self) -> list[int]:
        """Numbers of the blocks with the same tensors as the last one, so that one can take the place of another."""
        blocks = blocks_of(self.model.network)[1]
        return [number for number, block in enumerate(blocks) if signature(block) == signature(blocks[-1])]

    @torch.no_grad()
    def vectors(self, cases: Sequence[Left]) -> list[torch.Tensor]:
        """Embed all texts with parts left out.

        Returns:
            For each case the vectors, float32 [texts, dimension], in the order of the batches.
        """

        def wanted(number: int) -> set[Left]:
            return {frozenset(part for part in case if part[0] <= number) for case in cases}

        found: dict[Left, list[torch.Tensor]] = {}
        for _, states in self._through(wanted):
            found = states
        last = self._after_blocks()
        return [torch.cat([last(hidden, batch) for batch, hidden in enumerate(found[case])]) for case in cases]

    @torch.no_grad()
    def influence(self, parts: Sequence[BlockPart]) -> list[float]:
        """Return the influence of each part: mean over tokens of 1 - cosine of its block's outputs with and without it.

        For whole blocks this is the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853, equation 1): without the block
        its output is its input.
        """
        nothing: Left = frozenset()

        def wanted(number: int) -> set[Left]:
            return {nothing, *(frozenset([part]) for part in parts if part[0] == number)}

        found: dict[BlockPart, float] = {}
        for number, states in self._through(wanted):
            for part in parts:
                if part[0] == number:
                    # BI = 1 - E[x_i . x_(i+1) / (|x_i| |x_(i+1)|)], over the tokens of all texts
                    turned = [
                        1 - torch.cosine_similarity(self._tokens(whole, batch), self._tokens(left, batch), dim=1)
                        for batch, (whole, left) in enumerate(zip(states[nothing], states[frozenset([part])], strict=True))
                    ]
                    found[part] = float(torch.cat(turned).mean())
        return [found[part] for part in parts]

    @torch.no_grad()
    def angles(self, span: int) -> list[float]:
        """Return the angular distance from the input to the output of each run of `span` blocks, averaged over sampled tokens.

        Gromov et al. 2024, arXiv 2403.17887, section 3.2: d(x^(l), x^(l+n)) = arccos(cosine) / pi. They take only the last token of
        each text.
        """
        nothing: Left = frozenset()
        sampled: list[torch.Tensor] = []
        for _, states in self._through(lambda _: {nothing}, before=True):
            tokens = torch.cat([self._tokens(hidden, batch) for batch, hidden in enumerate(states[nothing])])
            sampled.append(tokens[:: max(1, len(tokens) // SAMPLED_TOKENS)].clone())
        return [
            float(torch.cosine_similarity(a, b, dim=1).clamp(-1, 1).arccos().mean() / torch.pi)
            for a, b in zip(sampled, sampled[span:], strict=False)
        ]

    def _tokens(self, hidden: torch.Tensor, batch: int) -> torch.Tensor:
        """Return the hidden states of a batch's tokens without padding, float32 [tokens, width]."""
        return hidden[torch.from_numpy(self.texts.batches[batch][1]).to(hidden.device).bool()].float()

    def _through(
        self, wanted: Callable[[int], Iterable[Left]], before: bool = False
    ) -> Iterator[tuple[int, dict[Left, list[torch.Tensor]]]]:
        """Run the texts through the blocks once for each different set of parts left out.

        Args:
            wanted: given a block's number, the sets of parts to leave out up to and including this block.
            before: whether to yield the input of the first block too, as number -1.

        Yields:
            A block's number and the hidden states after it, batch by batch, for each set of parts left out so far.
        """
        blocks = [segment for segment in self._segments if segment.kind is Kind.BLOCK]
        first = next(segment for segment in self._segments if segment.kind is Kind.EMBEDDINGS)
        embeddings = self._source.load(first)
        entered = [
            begin(self.model.network, self._segments, embeddings, *(torch.from_numpy(x).to(self.device) for x in batch))
            for batch in self.texts.batches
        ]
        del embeddings
        states: dict[Left, list[State]] = {frozenset(): [State(hidden, {}) for hidden, _ in entered]}
        if before:
            yield -1, _hidden_of(states)
        for number, segment in enumerate(blocks):
            (block,) = self._source.load(segment).values()
            made: dict[Left, list[State]] = {}
            for case in wanted(number):
                here = [name for at, name in case if at == number]
                arriving = states[frozenset(part for part in case if part[0] < number)]
                if "block" in here:
                    made[case] = [
                        leave_out(number, state, arguments) for state, (_, arguments) in zip(arriving, entered, strict=True)
                    ]
                    continue
                with without(block, [name for name in here if name != "block"]):
                    made[case] = [
                        run_block(block, number, state, arguments) for state, (_, arguments) in zip(arriving, entered, strict=True)
                    ]
            states = made
            yield number, _hidden_of(states)

    def _after_blocks(self) -> Callable[[torch.Tensor, int], torch.Tensor]:
        """Return a function from hidden states after the last block, and the batch's number, to vectors [texts, dimension]."""
        network = self.model.network
        loaded = {segment.kind: self._source.load(segment) for segment in self._segments if segment.kind in (Kind.NORM, Kind.HEAD)}
        norms: Parts = loaded.get(Kind.NORM, {})

        def finish(hidden: torch.Tensor, batch: int) -> torch.Tensor:
            for norm in norms.values():
                hidden = norm(hidden)
            masks = (torch.from_numpy(x).to(hidden.device) for x in (self.texts.batches[batch][1], self.texts.pooled[batch]))
            with replaced(network, loaded.get(Kind.HEAD, {})):
                vectors: torch.Tensor = head_of(network)(hidden, *masks)
            return vectors

        return finish


def _hidden_of(states: Mapping[Left, Sequence[State]]) -> dict[Left, list[torch.Tensor]]:
    """Return the hidden states of each case, batch by batch."""
    return {case: [state.hidden for state in batches] for case, batches in states.items()}
