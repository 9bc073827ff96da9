"""Texts are read as the file's name says, one for each line or row, or refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.common.errors import UserError
from compress.data.texts import LONGEST_LINE, read_texts

LINES = b'{"text": "one"}\n{"text": "two, three"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jsonl", LINES),
        ("t.JSONL", LINES),
        ("t.ndjson", LINES),
        ("t.jsonl", b"\xef\xbb\xbf" + LINES),
        ("t.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("t.NDJSON.GZ", gzip.compress(LINES, mtime=0)),
        ("t.json", b'["one", "two, three"]'),
        ("t.json", b'[\n{"text": "one"},\n{"text": "two, three"}]'),
        ("t.csv", b'label,text\r\n1,one\r\n2,"two, three"\r\n'),
        ("t.tsv", b"text\tlabel\none\t1\ntwo, three\t2\n"),
        ("t.csv.gz", gzip.compress(b'text\none\n"two, three"\n', mtime=0)),
        ("t.txt", b"\xef\xbb\xbfone\r\ntwo, three"),
        ("t.en", b"one\ntwo, three\n"),
    ],
)
def test_the_name_says_how_texts_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == ["one", "two, three"]


def test_parquet_is_read_by_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["one", "two, three"]}), tmp_path / "t.parquet")
    assert read_texts(tmp_path / "t.parquet") == ["one", "two, three"]
    parquet.write_table(pyarrow.table({"id": [1, 2]}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t\.parquet: has no column 'text'"):
        read_texts(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"text\none\n")
    with pytest.raises(UserError, match=r"t\.parquet: not a parquet file"):
        read_texts(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"a,b\n1,2\n", "line 1: has no column 'text'"),
        ("t.csv", b"text,b\n1\n", "line 2: has 1 columns, line 1 has 2"),
        ("t.tsv", b'text\tb\n"open\t1\n', "line 2: unexpected end of data"),
        ("t.json", b'{"text": "one"}', "must hold a list of texts"),
        ("t.json", b'[{"txt": "one"}]', "0: lacks 'text'; it has txt"),
        ("t.json", b'["one", 5]', "1 is int, not a string"),
        ("t.jsonl", b'{"text": null}', "line 1: 'text' is null, not a string"),
        ("t.jsonl", b'\n{"text": "lone \\ud800 half"}', "line 2: 'text' holds half of a surrogate pair"),
        ("t.jsonl", b'{"text": "one", "score": NaN}', "line 1: NaN is not a number"),
        ("t.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("t.txt", "one\n".encode("utf-16"), "not UTF-8 text"),
        ("t.xlsx", b"PK", r"\.xlsx files are not read"),
        ("t.yaml", b"- one", r"\.yaml files are not read"),
    ],
)
def test_what_is_not_texts_is_refused_by_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read_texts(tmp_path / name)


def test_devices_and_endless_lines_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero: a device"):
        read_texts("/dev/zero")
    (tmp_path / "bomb.txt.gz").write_bytes(gzip.compress(b"\0" * (LONGEST_LINE + 1), 9))
    with pytest.raises(UserError, match=r"bomb\.txt\.gz, line 1: longer than"):
        read_texts(tmp_path / "bomb.txt.gz")


def test_blank_lines_keep_their_row_where_rows_count(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("a\n\nb\n   \nc\n")
    assert read_texts(path, rows=True) == ["a", "", "b", "   ", "c"]
    assert read_texts(path) == ["a", "b", "c"]


def test_encode_writes_a_vector_for_each_line_and_only_npy(tmp_path: Path) -> None:
    path, runner = tmp_path / "t.txt", CliRunner()
    path.write_text("a\n\nb\n")
    done = runner.invoke(app, ["encode", "nano", str(path), "-o", str(tmp_path / "v.npy")], catch_exceptions=False)
    assert "3 vectors" in done.output
    assert len(np.load(tmp_path / "v.npy")) == 3
    with pytest.raises(UserError, match=r"v\.csv: vectors are written as \.npy, not as \.csv"):
        runner.invoke(app, ["encode", "nano", str(path), "-o", str(tmp_path / "v.csv")], catch_exceptions=False)
    assert not (tmp_path / "v.csv").exists()
