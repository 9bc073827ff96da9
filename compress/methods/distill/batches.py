"""The texts of a training as token ids, and the order in which they come: it follows from the seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from compress.methods.distill.settings import DistillSettings
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Ids, TextTokenizer

# Batches are sorted by length within runs of this many and then shuffled: little padding, and any two texts can still meet.
SORTED_BATCHES = 32
# A batch's length is rounded up to a multiple of this.
LENGTH_STEP = 8


class TokenTexts:
    """Texts as token ids in one flat array, with the number of each text's leading tokens that are not pooled."""

    def __init__(self, rows: Sequence[Ids], unpooled: Sequence[int]) -> None:
        """`rows`: each text's token ids, int64 [tokens]; `unpooled`: how many of its first tokens are left out of the pooling."""
        self._flat = np.concatenate(rows).astype(np.int32)
        self.lengths = np.array([len(row) for row in rows])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._unpooled = np.array(unpooled)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    def batch(self, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return padded ids, their mask, and the mask of pooled tokens, int64 [texts, length] each."""
        # Lengths are rounded up because matrix multiplication keeps memory for every shape that it has seen.
        longest = min(-(-int(self.lengths[chosen].max()) // LENGTH_STEP) * LENGTH_STEP, int(self.lengths.max()))
        ids, mask = (np.zeros((len(chosen), longest), dtype=np.int64) for _ in range(2))
        for row, index in enumerate(chosen):
            length = self.lengths[index]
            ids[row, :length] = self._flat[self._starts[index] : self._starts[index] + length]
            mask[row, :length] = 1
        pooled = mask * (np.arange(longest)[None] >= self._unpooled[chosen][:, None])
        return tuple(torch.from_numpy(array) for array in (ids, mask, pooled))  # type: ignore[return-value]


def tokenized(
    tokenizer: TextTokenizer, texts: Sequence[str], prompts: Sequence[str], spec: EmbedderSpec, max_tokens: int
) -> TokenTexts:
    """Tokenize texts, each after its own prompt, cut at `max_tokens`. A prompt never hides the last token from the pooling."""
    lengths = {prompt: 0 if spec.pool_prompt or not prompt else tokenizer.prompt_length(prompt) for prompt in set(prompts)}
    rows = [row[:max_tokens] for row in tokenizer([prompt + text for prompt, text in zip(prompts, texts, strict=True)])]
    unpooled = [min(lengths[prompt], len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    return TokenTexts(rows, unpooled)


def batch_order(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of an epoch as indices of texts, int64 [batch] each. Texts that do not fill a batch are left out."""
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    whole = len(lengths) // batch * batch
    batches: list[np.ndarray] = []
    for start in range(0, whole, batch * SORTED_BATCHES):
        run = shuffled[start : min(start + batch * SORTED_BATCHES, whole)]
        batches += np.split(run[np.argsort(lengths[run], kind="stable")], len(run) // batch)
    return [batches[index] for index in generator.permutation(len(batches))]


def batches_from(lengths: np.ndarray, settings: DistillSettings, start: int) -> Iterator[np.ndarray]:
    """Yield the batches from number `start` on, epoch after epoch.

    Raises:
        ValueError: there are fewer texts than one batch takes.
    """
    an_epoch = len(lengths) // settings.batch
    if an_epoch == 0:
        raise ValueError(f"{len(lengths)} texts do not fill a batch of {settings.batch}")
    number, epoch = start, -1
    while True:
        if number // an_epoch != epoch:
            epoch = number // an_epoch
            batches = batch_order(lengths, settings.batch, settings.seed, epoch)
        yield batches[number % an_epoch]
        number += 1


def drawn_depths(shallower: Sequence[int], count: int, seed: int, batch: int) -> tuple[int, ...]:
    """Return the depths that a batch is compared at in addition to the whole one: `count` of `shallower`, in ascending order.

    They follow from the seed and the batch's number alone, as the order of the texts does.
    """
    generator = np.random.default_rng([seed, batch, len(shallower)])
    drawn = generator.choice(len(shallower), size=min(count, len(shallower)), replace=False)
    return tuple(sorted(shallower[place] for place in drawn))


def with_neighbours(chosen: np.ndarray, neighbours: np.ndarray | None) -> np.ndarray:
    """Return a batch's texts: as many of `chosen` as leave room for their `neighbours`, and those neighbours, each text once."""
    if neighbours is None:
        return chosen
    anchors = chosen[: max(1, len(chosen) // (1 + neighbours.shape[1]))]
    return np.unique(np.concatenate([anchors, neighbours[anchors].ravel()]))
