"""`compress encode`: vectors are written as they are made, and are those of one call."""

from __future__ import annotations

import io
import resource
import sys
from pathlib import Path

import numpy as np
import pytest
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.models import embedder as batching
from compress.models.text import tokens
from compress.runtimes.encoding import EncodeOptions, encode_file


def test_a_file_s_vectors_are_those_of_one_call(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"text number {number} " + "word " * (number % 7) for number in range(50)]
    (tmp_path / "t.txt").write_text("\n".join(lines) + "\n")
    whole = io.BytesIO()
    monkeypatch.setattr(batching, "CHUNK_TEXTS", 20)
    np.save(whole, compress.load(str(bert), device="cpu").encode(lines))
    assert encode_file(str(bert), tmp_path / "t.txt", tmp_path / "v.npy", EncodeOptions(device="cpu")) == (50, 48)
    assert (tmp_path / "v.npy").read_bytes() == whole.getvalue()


def test_a_fault_in_the_last_line_is_found_before_the_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' * 3 + '{"txt": "b"}\n')
    with pytest.raises(UserError, match=r"t\.jsonl, line 4: lacks 'text'"):
        encode_file("no model", tmp_path / "t.jsonl", tmp_path / "v.npy")
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(UserError, match="half of a surrogate pair"):
        encode_file("no model", tmp_path / "t.jsonl", tmp_path / "v.npy")
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]


def test_few_long_texts_fill_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "CHUNK_CHARACTERS", 10)
    assert [len(chunk) for chunk in batching.checked_chunks(["12345"] * 5)] == [2, 2, 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_very_long_text_has_the_tokens_that_it_had(bert: Path, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    folder = folder_of(bert)
    monkeypatch.setattr(tokens, "SHORTEST_CUT", 3000)
    spec = folder.spec.model_copy(update={"truncation_side": side})
    cut = tokens.TextTokenizer(tokens.open_tokenizer(bert), 48, spec)
    monkeypatch.setattr(tokens, "SHORTEST_CUT", sys.maxsize)
    whole = tokens.TextTokenizer(tokens.open_tokenizer(bert), 48, spec)
    for text in (
        "the parcel never came, " * 2000,
        "a" * 50_000,
        "b" * 50_000 + " and an end " * 100,
        " " * 50_000 + "late",
        "early" + " " * 50_000,
        "x " * 5 + "y" * 40_000 + " z" * 3000,
        "東京 " * 20_000,
    ):
        np.testing.assert_array_equal(cut([text])[0], whole([text])[0], err_msg=text[:20])


def test_a_line_of_fifty_megabytes_costs_its_tokens(bert: Path) -> None:
    tokenizer = folder_of(bert).tokenizer
    for text in ("lorem ipsum " * 4_000_000, "a" * 50_000_000):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(tokenizer([text])[0]) > 2
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes
