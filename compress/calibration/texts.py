"""Calibration texts, and how they are batched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.common.errors import UserError
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Batch, Ids, TextTokenizer, batches_by_tokens, pad_batch

if TYPE_CHECKING:
    from compress.models.text.tokens import TextTokenizer


FEWEST_TEXTS, FEWEST_TOKENS = 8, 64
"""Distinct texts, and tokens in them, below which a static scale would be one of those texts alone."""
ENOUGH_TEXTS, ENOUGH_TOKENS = 64, 2_048
"""From here on nothing is warned of."""


def _told(distinct: set[str]) -> str:
    return f"{len(distinct)} distinct text{'s' if len(distinct) != 1 else ''}"


@dataclass(frozen=True)
class CalibrationSource:
    """The texts that methods calibrate on."""

    texts: Sequence[str]
    prompts: Sequence[str] | None
    """Prompts that are put before the texts in turn; None: the model's own."""
    max_tokens: int
    """Number of tokens at which texts are cut, with their prompts."""

    def check(self, tokenizer: TextTokenizer | None) -> str | None:
        """See that the texts can say something of a model's inputs; return a warning where they say little.

        Args:
            tokenizer: the model's, where a step stores static scales: what a scale has not seen, it cuts. None: no step does.

        Raises:
            UserError: the texts are blank, or too few for a static scale.
        """
        distinct = {text for text in self.texts if text.strip()}
        if not distinct:
            raise UserError(
                f"calibration: none of {len(self.texts)} texts has a word in it", "give texts like those to be embedded"
            )
        if tokenizer is None:
            return f"{_told(distinct)} to calibrate on: they stand for no others" if len(distinct) < FEWEST_TEXTS else None
        tokens = sum(min(length, self.max_tokens) for length in tokenizer.lengths(sorted(distinct)))
        if len(distinct) < FEWEST_TEXTS or tokens < FEWEST_TOKENS:
            raise UserError(
                f"calibration: {_told(distinct)} of {tokens:,} tokens are too few for static scales, which need "
                f"{FEWEST_TEXTS} and {FEWEST_TOKENS}",
                "give more texts, or take `activations: dynamic_per_token`",
            )
        if len(distinct) < ENOUGH_TEXTS or tokens < ENOUGH_TOKENS:
            return f"static scales of {_told(distinct)} and {tokens:,} tokens: larger values of other texts will be cut"
        return None

    def batches(self, tokenizer: TextTokenizer, spec: EmbedderSpec) -> CalibrationTexts:
        """Tokenize and batch the texts."""
        prompts = list(dict.fromkeys(spec.prompts.values())) if self.prompts is None else self.prompts
        return calibration_batches(
            tokenizer, self.texts, prompts, pool_prompt=spec.pool_prompt, max_tokens=min(self.max_tokens, tokenizer.max_length)
        )


# Padded tokens per batch: few enough that the widest activations of a 7B model stay below a gigabyte.
BATCH_TOKENS = 2_048


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts as batches, with the tokens of each batch that the model pools."""

    batches: list[Batch]
    pooled: list[Ids]
    """Pooling mask of each batch, int64 [texts, length]: 1 for pooled tokens, 0 for padding and for a prompt that is not pooled."""

    @property
    def tokens(self) -> int:
        """Number of tokens without padding."""
        return int(sum(mask.sum() for _, mask in self.batches))


def calibration_batches(
    tokenizer: TextTokenizer, texts: Sequence[str], prompts: Sequence[str], *, pool_prompt: bool, max_tokens: int
) -> CalibrationTexts:
    """Tokenize texts, each with one of the prompts in turn, and batch them.

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts.
        prompts: prompts that are put before the texts in turn.
        pool_prompt: whether the model pools the prompt's tokens.
        max_tokens: number of tokens at which texts are cut, with their prompts.

    Raises:
        UserError: a prompt leaves no room for any token of a text.
    """
    prompts = list(prompts) or [""]
    lengths = {prompt: 0 if pool_prompt or not prompt else tokenizer.prompt_length(prompt) for prompt in prompts}
    given = [prompts[index % len(prompts)] for index in range(len(texts))]
    rows = [row[:max_tokens] for row in tokenizer([prompt + text for prompt, text in zip(given, texts, strict=True)])]
    for prompt, row in zip(given, rows, strict=True):
        if len(row) <= lengths[prompt]:
            raise UserError(
                f"calibration: {max_tokens} tokens leave no room for a text after the prompt {prompt!r}", "raise max_tokens"
            )
    batches, pooled = [], []
    for chosen in batches_by_tokens([len(row) for row in rows], BATCH_TOKENS):
        ids, mask = pad_batch([rows[index] for index in chosen])
        starts = np.array([lengths[given[index]] for index in chosen])
        batches.append((ids, mask))
        pooled.append(mask * (np.arange(mask.shape[1])[None] >= starts[:, None]))
    return CalibrationTexts(batches, pooled)
