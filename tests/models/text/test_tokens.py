"""Batching by a token budget; a tokenizer that ends texts itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import LONGEST_PADDED, TextTokenizer, batches_by_tokens, open_tokenizer, pad_batch


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


def test_a_tokenizer_may_end_texts_itself(nv_embed: Path) -> None:
    spec = EmbedderSpec(suffix="</s>", prompt_specials=False, pool_prompt=False)
    before = TextTokenizer(open_tokenizer(nv_embed), 16, spec)
    after = before.ending_itself()
    assert after.spec.suffix == ""
    for text in ("", "a b", "ends in white space "):
        assert after([text])[0].tolist() == before([text])[0].tolist()
    end = before([""])[0][-1]
    cut = after(["many words " * 20])[0]
    assert (len(cut), cut[-1]) == (16, end)
    assert before(["many words " * 20])[0][-1] != end
    assert after.prompt_length("find it: ") == len(after(["find it: "])[0]) - 1


def test_a_tokenizer_without_that_token_cannot() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="cannot add '</s>' after texts"):
        TextTokenizer(tokenizer, 16, EmbedderSpec(suffix="</s>")).ending_itself()
    tokenizer.add_special_tokens(["</s>"])
    assert TextTokenizer(tokenizer, 16, EmbedderSpec(suffix="</s>")).ending_itself()(["a a"])[0].tolist() == [0, 0, 2]
