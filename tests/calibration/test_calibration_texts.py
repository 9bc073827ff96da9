"""How calibration texts are batched."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests_support import text_side

from compress.calibration.texts import calibration_batches
from compress.common.errors import UserError
from compress.data.texts import calibration_texts


def test_prompts_come_in_turn_and_too_few_tokens_are_refused(nv_embed: Path) -> None:
    spec, tokenizer = text_side(nv_embed)
    texts = calibration_texts()[:4]
    made = calibration_batches(tokenizer, texts, ("find: ", ""), pool_prompt=True, max_tokens=40)
    expected = {tuple(row[:40]) for row in tokenizer([f"find: {texts[0]}", texts[1], f"find: {texts[2]}", texts[3]])}
    assert {tuple(ids[i, : mask[i].sum()]) for ids, mask in made.batches for i in range(len(ids))} == expected
    with pytest.raises(UserError, match="8 tokens leave no room for a text"):
        calibration_batches(tokenizer, texts, (max(spec.prompts.values(), key=len),), pool_prompt=False, max_tokens=8)
