"""Numbers in README and docs/ are those of the records, and what says so notices when they are not."""

from __future__ import annotations

from pathlib import Path

import measured
import pytest

INT8 = "<!-- faster: int8-minilm -->"


@pytest.mark.parametrize("page", measured.pages(), ids=lambda page: page.name)
def test_every_number_has_its_record_or_its_command(page: Path) -> None:
    assert measured.faults(page.read_text(encoding="utf-8")) == []


def test_each_block_and_key_is_used_and_no_page_has_an_unknown_one() -> None:
    texts = [page.read_text(encoding="utf-8") for page in measured.pages()]
    blocks = {found["name"] for text in texts for found in measured.BLOCK.finditer(text)}
    keys = {found["key"] for text in texts for found in measured.MARK.finditer(text)} - {"by", "table"}
    assert blocks == set(measured.BLOCKS)
    assert keys == set(measured.VALUES)


@pytest.mark.parametrize(
    "text",
    [
        f"It runs at 1.51 times{INT8} float32's speed.",
        f"1.5 times{INT8}",
        f"| a | b |\n|---|---|\n| x | 1.51x{INT8} |\n\n<!-- by: python benchmarks/x.py -->",
        "<!-- by: python benchmarks/x.py -->\n\n| a | ms |\n|---|---|\n| x | 1.5 |",
        "It took 3 min. <!-- by: make demo -->",
        "the 95 % interval and `--margin 1 %`",
        "99.81 to 100.34<!-- interval: int8-openvino-minilm -->",
    ],
)
def test_right_numbers_are_let_through(text: str) -> None:
    wrong = [fault for fault in measured.faults(text) if "table '| a | b |'" not in fault]
    assert wrong == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"It runs at 1.55 times{INT8} float32's speed.", "has faster 1.51"),
        ("kept 99.99 %<!-- kept: int8-minilm -->", "has kept 100.00"),
        ("99.81 to 100.35<!-- interval: int8-openvino-minilm -->", "has interval"),
        ("twice as fast<!-- faster: int8-minilm -->", "no number before"),
        ("1.51 times<!-- faster: int8-minilmm -->", "names 0 runs"),
        ("1.30 times<!-- faster: int8-nano -->", "names 2 runs"),
        ("1.51 times<!-- speed: int8-minilm -->", "is no key of a record"),
        ("It runs at 1.51 times float32's speed.", "has no source"),
        ("It runs 1.51x as fast, and keeps 99 %.", "has no source"),
        ("The file takes 34.6 MB.", "has no source"),
        ("| a | b |\n|---|---|\n| x | 34.6 MB |", "measured numbers and no"),
        ("| a | p50 ms |\n|---|---|\n| x | 6 |", "measured numbers and no"),
        ("It took 3 min. <!-- by: measured once -->", "neither a command nor a file"),
        ("<!-- table: quantisation -->\n\n<!-- end -->", "there are"),
        ("<!-- table: take -->\n\n| you need |\n\n<!-- end -->", "not what the records say"),
    ],
)
def test_wrong_and_unsourced_numbers_are_found(text: str, reason: str) -> None:
    assert any(reason in fault for fault in measured.faults(text)), measured.faults(text)


def test_one_changed_digit_in_a_page_is_found() -> None:
    page = (measured.ROOT / "docs" / "quantization.md").read_text(encoding="utf-8")
    changed = page.replace("| 2.64x |", "| 2.65x |")
    assert changed != page
    assert measured.faults(changed) == ["table 'quantization' is not what the records say: python docs/measured.py writes it"]
    assert measured.written(changed) == page
