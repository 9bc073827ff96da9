"""How calibration texts are batched."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests_support import folder_of, text_side

from compress.calibration.texts import CalibrationSource, calibration_batches
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


def test_static_scales_need_texts(bert: Path) -> None:
    """Few or equal texts are refused or warned of; without static scales, only blank ones are refused."""
    tokenizer, many = folder_of(bert).tokenizer, list(calibration_texts())

    def told(texts: list[str], *, static: bool = True) -> str | None:
        return CalibrationSource(texts, None, 512).check(tokenizer if static else None)

    for texts, message in (
        ([""] * 40, "none of 40 texts has a word in it"),
        (["one text"] * 512, "1 distinct text of 5 tokens are too few for static scales"),
        (many[:4], "4 distinct texts of"),
        ([str(number) for number in range(9)], "9 distinct texts of"),
    ):
        with pytest.raises(UserError, match=message):
            told(texts)
    assert "static scales of 20 distinct texts" in (told(many[:20]) or "")
    assert told(many) is None
    assert "1 distinct text to calibrate on" in (told(["one text"] * 512, static=False) or "")
    assert told(many[:8], static=False) is None
