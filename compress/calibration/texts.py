"""Calibration texts, and how they become batches."""

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


@dataclass(frozen=True)
class CalibrationSource:
    """What methods that calibrate are shown."""

    texts: Sequence[str]
    prompts: Sequence[str] | None
    """Put before the texts in turn; None: the model's own, each once."""
    max_tokens: int

    def batches(self, tokenizer: TextTokenizer, spec: EmbedderSpec) -> CalibrationTexts:
        """Tokenize and batch the texts."""
        prompts = list(dict.fromkeys(spec.prompts.values())) if self.prompts is None else self.prompts
        return calibration_batches(
            tokenizer, self.texts, prompts, pool_prompt=spec.pool_prompt, max_tokens=min(self.max_tokens, tokenizer.max_length)
        )


# Padded tokens a batch holds: little enough that a 7B's widest activations stay below a gigabyte.
BATCH_TOKENS = 2_048


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts as batches, and of each batch which tokens the model pools."""

    batches: list[Batch]
    pooled: list[Ids]
    """int64 [texts, length], 1 for tokens that are pooled, 0 for padding and for a prompt that is not."""

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return int(sum(mask.sum() for _, mask in self.batches))


def calibration_batches(
    tokenizer: TextTokenizer, texts: Sequence[str], prompts: Sequence[str], *, pool_prompt: bool, max_tokens: int
) -> CalibrationTexts:
    """Tokenize texts, each with one of the prompts in turn, and batch them.

    Args:
        tokenizer: the model's.
        texts: the texts.
        prompts: put before them, the first before the first text, and so on, over and over.
        pool_prompt: whether the model pools the prompt's tokens.
        max_tokens: texts are cut here, their prompts included.

    Raises:
        UserError: a prompt leaves no token of a text.
    """
    prompts = list(prompts) or [""]
    lengths = {prompt: 0 if pool_prompt or not prompt else tokenizer.prompt_length(prompt) for prompt in prompts}
    given = [prompts[index % len(prompts)] for index in range(len(texts))]
    rows = [row[:max_tokens] for row in tokenizer([prompt + text for prompt, text in zip(given, texts, strict=True)])]
    for prompt, row in zip(given, rows, strict=True):
        if len(row) <= lengths[prompt]:
            raise UserError(
                f"calibration: {max_tokens} tokens leave none of a text behind the prompt {prompt!r}", "raise max_tokens"
            )
    batches, pooled = [], []
    for chosen in batches_by_tokens([len(row) for row in rows], BATCH_TOKENS):
        ids, mask = pad_batch([rows[index] for index in chosen])
        starts = np.array([lengths[given[index]] for index in chosen])
        batches.append((ids, mask))
        pooled.append(mask * (np.arange(mask.shape[1])[None] >= starts[:, None]))
    return CalibrationTexts(batches, pooled)
