"""Task data and texts that are broken, hostile or useless."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any

from bad_support import Case, Place


def cases() -> list[Case]:
    """All cases of this class."""
    found: list[Case] = []

    def add(kind: str, name: str, build: Callable[[Place], list[str]], needle: str = "", **more: Any) -> None:
        found.append(Case(kind, name, build, needle, **more))

    ROW = '{"sentence1": "a cat", "sentence2": "a dog", "score": 1}\n'

    def sts(name: str, content: bytes | None, needle: str = "test.jsonl", suffix: str = "", **more: Any) -> None:
        def build(place: Place) -> list[str]:
            folder = place.cwd / "data" / "STSBenchmark"
            folder.mkdir(parents=True)
            if content is not None:
                (folder / f"test.jsonl{suffix}").write_bytes(content)
            return place.evaluate("data", "STSBenchmark")

        add("data", f"STS: {name}", build, needle, **more)

    many = "".join(ROW.replace("a cat", f"cat {n}").replace("1}", f"{n % 5}}}") for n in range(20)).encode()
    sts("no file", None, "STSBenchmark")
    sts("empty file", b"")
    sts("one row", ROW.encode(), codes=(0, 2), needle="")
    sts("blank lines", b"\n\n\n")
    sts("not JSON", ROW.encode() + b"{broken\n", "line 2")
    sts("a list a line", b"[1, 2]\n", "line 1")
    sts("a column missing", b'{"sentence1": "a", "score": 1}\n', "line 1")
    sts("score a string", many + ROW.replace("1}", '"x"}').encode(), "test.jsonl")
    sts("score null", many + ROW.replace("1}", "null}").encode(), "test.jsonl")
    sts("score NaN", many + ROW.replace("1}", "NaN}").encode(), "test.jsonl")
    sts("score a list", many + ROW.replace("1}", "[1]}").encode(), "test.jsonl")
    sts("sentence null", many + ROW.replace('"a cat"', "null").encode(), "test.jsonl")
    sts("sentence a number", many + ROW.replace('"a cat"', "5").encode(), "test.jsonl")
    sts("sentence a mapping", many + ROW.replace('"a cat"', '{"a": 1}').encode(), "test.jsonl")
    sts("NUL bytes in a sentence", many + ROW.replace("a cat", "a\\u0000cat").encode(), codes=(0, 2), needle="")
    sts("raw NUL bytes", many + b"\0\0\0\n", "line 21")
    sts("a lone surrogate", many + ROW.replace("a cat", "\\ud800").encode(), "", codes=(0, 2))
    sts("CRLF", many.replace(b"\n", b"\r\n"), codes=(0,), needle="")
    sts("BOM", b"\xef\xbb\xbf" + many, "", codes=(0,))
    sts("UTF-16", many.decode().encode("utf-16"), "test.jsonl")
    sts("not UTF-8", many + b'{"sentence1": "\xff"}\n', "test.jsonl")
    sts("100,000 deep", many + b"[" * 100000 + b"\n", "test.jsonl")
    sts("a line of 20 MB", many + ROW.replace("a cat", "word " * 4_000_000).encode(), codes=(0, 2), needle="", seconds=60)
    sts("a number of 5,000 digits", many + ROW.replace("1}", "1" * 5000 + "}").encode(), "test.jsonl")
    sts("broken gz", b"not a gzip", "test.jsonl.gz", suffix=".gz")
    sts("cut gz", gzip.compress(many)[:-20], "test.jsonl.gz", suffix=".gz")
    sts("gz with a wrong checksum", gzip.compress(many)[:-8] + b"\0" * 8, "test.jsonl.gz", suffix=".gz")
    sts("empty gz", b"", "test.jsonl.gz", suffix=".gz")
    sts("gz bomb of 1 GB", gzip.compress(b"\0" * 10**6, 9) * 1000, "test.jsonl.gz", suffix=".gz", seconds=60)
    add("data", "data a file", lambda place: place.evaluate("texts.txt", "STSBenchmark"), "texts.txt")
    add("data", "data missing", lambda place: place.evaluate("nowhere", "STSBenchmark"), "nowhere")
    add("data", "task a path", lambda place: place.evaluate(".", "../../etc"), "../../etc")

    def beir(
        name: str,
        needle: str,
        corpus: str = '{"_id": "d1", "text": "a"}\n{"_id": "d2", "text": "b"}\n',
        queries: str = '{"_id": "q1", "text": "a"}\n',
        qrels: str | None = "query-id\tcorpus-id\tscore\nq1\td1\t1\n",
        **more: Any,
    ) -> None:
        def build(place: Place) -> list[str]:
            folder = place.cwd / "data" / "SciFact"
            (folder / "qrels").mkdir(parents=True)
            (folder / "corpus.jsonl").write_text(corpus)
            (folder / "queries.jsonl").write_text(queries)
            if qrels is not None:
                (folder / "qrels" / "test.tsv").write_text(qrels)
            return place.evaluate("data", "SciFact")

        add("data", f"BEIR: {name}", build, needle, **more)

    beir("sound", "", codes=(0,))
    beir("no qrels", "qrels", qrels=None)
    beir("qrels empty", "test.tsv", qrels="")
    beir("qrels only a heading", "test.tsv", qrels="query-id\tcorpus-id\tscore\n")
    beir("qrels with commas", "line 2", qrels="query-id\tcorpus-id\tscore\nq1,d1,1\n")
    beir("qrels with a word", "line 2", qrels="query-id\tcorpus-id\tscore\nq1\td1\tyes\n")
    beir("qrels of an unknown document", "line 2", qrels="query-id\tcorpus-id\tscore\nq1\td9\t1\n")
    beir("qrels negative", "", qrels="query-id\tcorpus-id\tscore\nq1\td1\t-1\n", codes=(0, 2))
    beir("qrels of --1", "line 2", qrels="query-id\tcorpus-id\tscore\nq1\td1\t--1\n")
    beir("qrels superscript", "line 2", qrels="query-id\tcorpus-id\tscore\nq1\td1\t\u00b2\n")
    beir("qrels 10^30", "", qrels="query-id\tcorpus-id\tscore\nq1\td1\t1" + "0" * 30 + "\n", codes=(0, 2))
    beir("qrels quoted", "test.tsv", qrels='query-id\tcorpus-id\tscore\n"q1\td1\t1\n')
    beir("qrels huge field", "line 2", qrels="query-id\tcorpus-id\tscore\n" + "q" * 200_000 + "\td1\t1\n")
    beir("corpus text null", "corpus.jsonl", corpus='{"_id": "d1", "text": null}\n{"_id": "d2", "text": "b"}\n')
    beir("corpus text a number", "corpus.jsonl", corpus='{"_id": "d1", "text": 5}\n{"_id": "d2", "text": "b"}\n')
    beir("corpus id twice", "corpus.jsonl", corpus='{"_id": "d1", "text": "a"}\n{"_id": "d1", "text": "b"}\n', codes=(0, 2))
    beir("query text null", "queries.jsonl", queries='{"_id": "q1", "text": null}\n')

    def banking(name: str, rows: list[dict[str, Any]], needle: str, **more: Any) -> None:
        def build(place: Place) -> list[str]:
            folder = place.cwd / "data" / "Banking77Classification"
            folder.mkdir(parents=True)
            for split in ("train", "test"):
                (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            return place.evaluate("data", "Banking77Classification")

        add("data", f"classes: {name}", build, needle, **more)

    banking("one class", [{"text": f"t{n}", "label": 1} for n in range(20)], "Banking77Classification")
    banking(
        "labels of mixed kinds", [{"text": f"t{n}", "label": n if n % 2 else str(n)} for n in range(20)], "Banking77Classification"
    )
    banking("labels null", [{"text": f"t{n}", "label": None} for n in range(20)], "Banking77Classification")
    banking("a label a row", [{"text": f"t{n}", "label": n} for n in range(20)], "", codes=(0, 2))

    def texts(name: str, content: bytes, file: str = "t.jsonl", needle: str | None = None, **more: Any) -> None:
        def build(place: Place) -> list[str]:
            (place.cwd / file).write_bytes(content)
            return ["encode", str(place.base / "model"), file, "-o", "../out/v.npy"]

        add("data", f"encode: {name}", build, file if needle is None else needle, **more)

    texts("empty file", b"", "t.txt", codes=(0, 2))
    texts("not UTF-8", b"\xff\xfe\n", "t.txt")
    texts("NUL bytes", b"a\0b\n", "t.txt", codes=(0, 2), needle="")
    texts("text null", b'{"text": null}\n')
    texts("text a list", b'{"text": ["a"]}\n')
    texts("a surrogate", b'{"text": "a\\ud800b"}\n', needle="", codes=(0, 2))
    texts("100,000 deep", b"[" * 100000 + b"\n")
    add("data", "encode: a folder", lambda place: ["encode", str(place.base / "model"), ".", "-o", "../out/v.npy"], "")
    add(
        "data",
        "encode: /dev/zero",
        lambda place: ["encode", str(place.base / "model"), "/dev/zero", "-o", "../out/v.npy"],
        "/dev/zero",
        seconds=20,
    )
    return found
