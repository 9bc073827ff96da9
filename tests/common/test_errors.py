"""Messages: long values are cut in the middle, the place and the remedy stay."""

from __future__ import annotations

from compress.common.errors import LONGEST_MESSAGE, UserError


def test_a_message_with_a_huge_value_keeps_its_beginning_and_its_end() -> None:
    said = UserError(f"r.yaml, line 3: {'x' * 10**6}: too long").message
    assert said.startswith("r.yaml, line 3: xxx")
    assert said.endswith("xxx: too long")
    assert "996,0" in said
    assert len(said) < LONGEST_MESSAGE + 100


def test_a_message_of_the_longest_length_is_left_alone() -> None:
    assert UserError("x" * LONGEST_MESSAGE).message == "x" * LONGEST_MESSAGE
