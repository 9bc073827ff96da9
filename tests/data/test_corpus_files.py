"""Corpora of every format: the same records, from any place on, and every fault by its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from compress.common.errors import UserError
from compress.data.corpus import START, Block, Corpus, dataset_source, open_corpus
from compress.data.rows import Columns

TEXTS = ["the parcel never came", "日本語の文章です。", "", 'with, a comma and "quotes"', "a\ttab", "x" * 3000, "last"]


def write(path: Path, texts: list[str]) -> Path:
    """Write texts with ids 100, 101, ... in the format of the name."""
    rows = [{"id": 100 + number, "text": text} for number, text in enumerate(texts)]
    kind = path.name.split(".")[1]
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
        return path
    if kind == "jsonl":
        content = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    elif kind == "txt":
        content = "".join(f"{text}\r\n" for text in texts)
    else:
        separator = "," if kind == "csv" else "\t"
        cells = [["id", "text"], *([str(row["id"]), str(row["text"])] for row in rows)]
        content = "".join(separator.join('"' + cell.replace('"', '""') + '"' for cell in line) + "\n" for line in cells)
    data = ("\ufeff" + content).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    elif path.suffix == ".zst":
        packed = pyarrow.compress(data[:50], "zstd", asbytes=True) + pyarrow.compress(data[50:], "zstd", asbytes=True)
        data = bytes(packed)
    path.write_bytes(data)
    return path


def listed(blocks: list[Block]) -> list[tuple[object, str, str]]:
    return [
        (id, text, block.place(index))
        for block in blocks
        for index, (id, text) in enumerate(zip(block.ids, block.texts, strict=True))
    ]


@pytest.mark.parametrize("name", ["t.txt", "t.txt.gz", "t.jsonl", "t.jsonl.zst", "t.csv", "t.tsv.gz", "t.parquet"])
def test_every_format_gives_the_records_from_any_block_on(tmp_path: Path, name: str) -> None:
    lines = name.startswith("t.txt")
    corpus = open_corpus(str(write(tmp_path / name, TEXTS)), Columns() if lines else Columns("text", "id"))
    whole = list(corpus.blocks(2))
    assert [text for _, text, _ in listed(whole)] == TEXTS
    ids = range(7) if lines else range(100, 107)
    assert [id for id, _, _ in listed(whole)] == [str(id) if name[2:5] in ("csv", "tsv") else id for id in ids]
    first = {"t.parquet": "row 1", "t.csv": "line 2", "t.tsv.gz": "line 2"}.get(name, "line 1")
    assert whole[0].place(0) == f"{name}, {first}"
    assert [block.records for block in whole] == [2, 2, 2, 1]
    assert whole[-1].bytes_read == corpus.bytes
    for block in whole[:-1]:
        rest = list(corpus.blocks(2, block.number + 1, block.next))
        assert listed(rest) == listed(whole[block.number + 1 :])
        assert [one.next for one in rest] == [one.next for one in whole[block.number + 1 :]]


def test_a_folder_s_files_follow_each_other_and_others_are_named(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (
        ("b/2.txt", "second\n"),
        ("a.txt", "first\nzero\n"),
        ("readme.md", "none"),
        ("_skip.txt", "none"),
        ("c.txt", ""),
    ):
        (tmp_path / name).write_text(text)
    corpus = open_corpus(str(tmp_path), Columns())
    (block,) = corpus.blocks(10)
    assert listed([block]) == [(0, "first", "a.txt, line 1"), (1, "zero", "a.txt, line 2"), (2, "second", "b/2.txt, line 1")]
    assert corpus.passed_over == ("readme.md",)
    assert listed(list(corpus.blocks(2, 1, next(corpus.blocks(2)).next))) == [(2, "second", "b/2.txt, line 1")]
    assert [one.name for one in open_corpus(f"{tmp_path}/**/*.txt", Columns()).sources] == [
        "_skip.txt",
        "a.txt",
        "b/2.txt",
        "c.txt",
    ]


def rejected(corpus: Corpus) -> dict[str, tuple[object, str]]:
    return {reject.place: (reject.id, reject.reason) for block in corpus.blocks(3) for _, reject in block.rejects}


def test_what_is_no_text_is_a_reject_with_its_place(tmp_path: Path) -> None:
    lines = [b'{"id": 1, "text": "good"}', b'{"id": 2, "text": null}', b'{"id": 3, "text": "\xff"}', b"{", b"[1]", b'{"id": 6}']
    lines += [b'{"id": "7", "text": "x"}', b'{"id": 8, "text": "\\ud800"}', b'{"id": 99999999999999999999, "text": "x"}']
    lines += [b'{"id": true, "text": "x"}', b'{"id": 11, "text": "good"}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    corpus = open_corpus(str(tmp_path / "t.jsonl"), Columns("text", "id"))
    found = rejected(corpus)
    assert [id for block in corpus.blocks(3) for id in block.ids] == [1, 11]
    assert {
        int(place.removeprefix("t.jsonl, line ")): reason.split(" (")[0].split(":")[0] for place, (_, reason) in found.items()
    } == {
        2: "is null, not a string",
        3: "is not UTF-8",
        4: "is not JSON",
        5: "is list, not an object",
        6: "lacks 'text'",
        7: "its id is str, the first one is an integer",
        8: "holds half of a surrogate pair, '\\ud800'",
        9: "its id is no integer of 64 bits",
        10: "its id is bool, the first one is an integer",
    }
    assert found["t.jsonl, line 2"][0] == 2
    assert found["t.jsonl, line 7"][0] is None


def test_tables_and_parquet_reject_bad_bytes(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"text,id\ngood,a\nb\xffd,b\nthree,c,d\n")
    assert rejected(open_corpus(str(tmp_path / "t.csv"), Columns("text", "id"))) == {
        "t.csv, line 3": ("b", "is not UTF-8"),
        "t.csv, line 4": (None, "has 3 columns, line 1 has 2"),
    }
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"good", b"b\xffd"]).buffers())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "t.parquet")
    assert rejected(open_corpus(str(tmp_path / "t.parquet"), Columns())) == {"t.parquet, row 2": (1, "is not UTF-8")}


def test_a_line_that_is_too_long_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.data.rows.LONGEST_LINE", 10)
    (tmp_path / "t.txt").write_text("short\n" + "x" * 25 + "\nshort\n")
    corpus = open_corpus(str(tmp_path / "t.txt"), Columns())
    assert listed(list(corpus.blocks(9))) == [(0, "short", "t.txt, line 1"), (2, "short", "t.txt, line 3")]
    assert rejected(corpus) == {"t.txt, line 2": (1, "is longer than 10 bytes")}


@pytest.mark.parametrize(
    ("name", "content", "columns", "said"),
    [
        ("t.jsonl", b'{"body": "x"}\n', Columns(), "has no column 'text'"),
        ("t.csv", b"txt\nx\n", Columns(), "has no column 'text'"),
        ("t.csv", b'text\n"x\n', Columns(), "unexpected end of data"),
        ("t.txt", b"x\n", Columns("body"), "lines of text have no columns"),
        ("t.json", b"[]", Columns(), "a JSON list is read whole"),
        ("t.npy", b"", Columns(), r"\.npy files are not read"),
        ("t.parquet", b"PAR1", Columns(), "not a Parquet file"),
        ("t.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], Columns(), "cannot be read"),
        ("t.jsonl.zst", bytes(pyarrow.compress(b'{"text": "x"}\n' * 99, "zstd", asbytes=True))[:-9], Columns(), "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_an_error(tmp_path: Path, name: str, content: bytes, columns: Columns, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(open_corpus(str(tmp_path / name), columns).blocks(10))


def test_missing_files_and_wrong_types_are_errors(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": [1], "id": [1.5], "body": ["x"]}), tmp_path / "t.parquet")
    for texts, columns, said in (
        (f"{tmp_path}/no.txt", Columns(), "cannot be read"),
        (f"{tmp_path}/*.txt", Columns(), "no file matches"),
        (f"{tmp_path}/t.parquet", Columns(), "column 'text' is int64, not strings"),
        (f"{tmp_path}/t.parquet", Columns("body", "id"), "column 'id' is double, not strings or integers"),
    ):
        with pytest.raises(UserError, match=said):
            list(open_corpus(texts, columns).blocks(10))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no files of texts"):
        open_corpus(f"{tmp_path}/none", Columns())


def test_a_changed_file_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("x" * 3_000_000)
    before = open_corpus(str(path), Columns()).sources
    assert open_corpus(str(path), Columns()).sources == before
    path.write_text("x" * 2_999_999 + "y")
    assert open_corpus(str(path), Columns()).sources != before


def test_a_data_set_is_read_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"body": ["a", None, "c"], "key": ["x", "y", "z"], "other": [1, 2, 3]})
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: rows if (name, split) == ("own/name", "test") else None)
    corpus = open_corpus("hub:own/name:body:test", Columns("text", "key"))
    assert listed(list(corpus.blocks(2))) == [
        ("x", "a", "hub:own/name:body:test, row 1"),
        ("z", "c", "hub:own/name:body:test, row 3"),
    ]
    assert (
        listed(list(corpus.blocks(1, 2, corpus.sources and list(corpus.blocks(1))[1].next)))
        == listed(list(corpus.blocks(2, 0, START)))[1:]
    )
    assert rejected(corpus) == {"hub:own/name:body:test, row 2": ("y", "is null, not a string")}
    with pytest.raises(UserError, match="has no column 'key2'"):
        dataset_source("n", rows, Columns("body", "key2"))
