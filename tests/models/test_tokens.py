"""Batching by a token budget."""

from __future__ import annotations

import numpy as np
import pytest

from compress.models.tokens import LONGEST_PADDED, batches_by_tokens, pad_batch


@pytest.mark.parametrize("budget", [1, 50, 1000])
def test_every_text_is_in_one_batch_within_the_budget(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 200, size=300).tolist()
    batches = list(batches_by_tokens(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(300))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(lengths, reverse=True)[:1] + firsts[1:]
    assert firsts == sorted(firsts, reverse=True)


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad_batch([np.array([5, 6, 7]), np.array([8])])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_long_texts_are_never_padded() -> None:
    lengths = [LONGEST_PADDED + 1, 10, LONGEST_PADDED + 1, LONGEST_PADDED + 9, LONGEST_PADDED, 20]
    batches = [batch.tolist() for batch in batches_by_tokens(lengths, 100_000)]
    assert batches == [[3], [0, 2], [4, 5, 1]]
