"""Mutated files from outside: whatever they hold, only a UserError may come out, or nothing.

`make test` tries some hundred of each; `make torture` as many as `TORTURE_EXAMPLES` says.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.measure.record import RECORD_FILE, Record
from compress.models.files.headers import read_header
from compress.models.files.variant import VARIANT_FILE, VariantInfo
from compress.models.folder import ModelFolder
from compress.pipeline.recipe_file import read_recipe
from compress.reports.compare import compare_runs
from compress.reports.formats import as_csv, as_json, as_markdown, as_table
from compress.runtimes.stored_vectors import VectorStore, key_of

ROOT = Path(__file__).parents[2]
FEW, MANY = 150, int(os.environ.get("TORTURE_EXAMPLES", 20_000))
HOSTILE = [
    b"", b"\0", b"\xff\xfe", b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b"99999999999999999999", b'""', b'"../../x"', b"true",
    b"[[[[[[[[", b"&a [*a]", b"<!--<script>", b"\n", b": ", b"- ", b'"\\ud800"', b"0.1", b"'", b"9" * 5000,
]  # fmt: skip
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    "",
    "x",
    "../../x",
    "\0",
    [],
    {},
    [[]],
    {"a": {}},
    [None] * 3,
    "é" * 300,
]

# Where in the file, how many bytes are replaced, and what by.
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 12), st.sampled_from(HOSTILE) | st.binary(max_size=4)), min_size=1, max_size=4
)
# Which of the places of a JSON document, and what it becomes; None: the place is taken away.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.sampled_from([*VALUES, ...])), min_size=1, max_size=3)


def mutated(content: bytes, mutations: list[tuple[float, int, bytes]]) -> bytes:
    for place, removed, added in mutations:
        at = int(place * len(content))
        content = content[:at] + added + content[at + removed :]
    return content


def changed(document: Any, changes: list[tuple[float, Any]]) -> Any:
    """A copy of a JSON document with other values at some places."""
    document = json.loads(json.dumps(document))
    for place, value in changes:
        spots: list[tuple[Any, Any]] = []

        def walk(node: Any, spots: list[tuple[Any, Any]] = spots) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                spots.append((node, key))
                walk(node[key])

        walk(document)
        if not spots:
            return None if value is ... else value
        node, key = spots[min(int(place * len(spots)), len(spots) - 1)]
        if value is ...:
            del node[key]
        else:
            node[key] = json.loads(json.dumps(value))  # a copy: lists would come to hold themselves
    return document


def only_user_errors(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        said = error.message
    else:
        return
    assert said.strip()
    assert len(said) < 10_000


def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
    """Try a test with a few examples, and with many under the mark `torture`."""
    return pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.torture)])(test)


def search(examples: int, strategy: st.SearchStrategy[Any], one: Callable[[Any], None]) -> None:
    quiet = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )  # fmt: skip
    quiet(given(strategy)(one))()


RECIPE = (ROOT / "recipes" / "int8.yaml").read_bytes()
CONFIG = json.loads((ROOT / "compress" / "data" / "nano" / "config.json").read_text())
SOME_RECORD = json.loads(next((ROOT / "results").glob("int8-openvino-minilm-*/record.json")).read_text())


@fuzzed
def test_recipes(tmp_path: Path, examples: int) -> None:
    path = tmp_path / "r.yaml"

    def one(mutations: list[tuple[float, int, bytes]]) -> None:
        path.write_bytes(mutated(RECIPE, mutations))
        only_user_errors(lambda: read_recipe(path))

    search(examples, MUTATIONS, one)


@fuzzed
def test_headers(tmp_path: Path, examples: int) -> None:
    tensors = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I8", "shape": [4], "data_offsets": [24, 28]},
    }
    path = tmp_path / "m.safetensors"

    def one(given: tuple[list[tuple[float, int, bytes]], list[tuple[float, Any]], bool]) -> None:
        mutations, changes, deep = given
        header = json.dumps(changed(tensors, changes)).encode()
        whole = struct.pack("<Q", len(header)) + header + bytes(28)
        path.write_bytes(whole if deep else mutated(whole, mutations))
        only_user_errors(lambda: read_header(path))

    search(examples, st.tuples(MUTATIONS, CHANGES, st.booleans()), one)


@fuzzed
def test_configs(tmp_path: Path, bert: Path, examples: int) -> None:
    config = json.loads((bert / "config.json").read_text())
    for path in bert.iterdir():
        if path.is_file() and path.name != "config.json":
            (tmp_path / path.name).symlink_to(path)

    def one(given: tuple[list[tuple[float, int, bytes]], list[tuple[float, Any]], bool]) -> None:
        mutations, changes, deep = given
        text = json.dumps(changed(config, changes)).encode()
        (tmp_path / "config.json").write_bytes(text if deep else mutated(text, mutations))
        only_user_errors(lambda: ModelFolder("m", tmp_path).config)

    search(examples, st.tuples(MUTATIONS, CHANGES, st.booleans()), one)


@fuzzed
def test_records_and_what_compares_them(tmp_path: Path, examples: int) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "good" / RECORD_FILE).write_text(json.dumps(SOME_RECORD))

    def one(given: tuple[list[tuple[float, int, bytes]], list[tuple[float, Any]], bool]) -> None:
        mutations, changes, deep = given
        text = json.dumps(changed(SOME_RECORD, changes)).encode()
        (tmp_path / "bad" / RECORD_FILE).write_bytes(text if deep else mutated(text, mutations))
        only_user_errors(lambda: Record.read(tmp_path / "bad"))
        found = compare_runs([tmp_path])  # the good one is there whatever the bad one holds
        assert any(line.run == SOME_RECORD["run"] for group in found.groups for line in group.lines)
        for write in (as_table, as_markdown, as_csv, as_json):
            assert write(found)

    search(examples, st.tuples(MUTATIONS, CHANGES, st.booleans()), one)


@fuzzed
def test_descriptions_of_variants(tmp_path: Path, examples: int) -> None:
    folder = ROOT / "tests" / "compatibility"
    kept = json.loads(next(folder.rglob(VARIANT_FILE)).read_text())

    def one(given: tuple[list[tuple[float, int, bytes]], list[tuple[float, Any]], bool]) -> None:
        mutations, changes, deep = given
        text = json.dumps(changed(kept, changes)).encode()
        (tmp_path / VARIANT_FILE).write_bytes(text if deep else mutated(text, mutations))
        only_user_errors(lambda: VariantInfo.read(tmp_path))

    search(examples, st.tuples(MUTATIONS, CHANGES, st.booleans()), one)


@fuzzed
def test_journals_and_stored_vectors(tmp_path: Path, examples: int) -> None:
    """A damaged entry is a miss, never a crash or another number."""
    journal = Journal(tmp_path / "scores", checked=True)
    journal.put("a", {"score": 0.5, "examples": [1, 2, 3]})
    text = journal.path("a").read_bytes()
    store = VectorStore(tmp_path / "vectors")
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    keys = [key_of("a", ""), key_of("b", "")]
    store.add(keys, rows)
    (file,) = (tmp_path / "vectors").iterdir()
    content = file.read_bytes()

    def one(mutations: list[tuple[float, int, bytes]]) -> None:
        journal.path("a").write_bytes(mutated(text, mutations))
        kept = journal.get("a") if journal.has("a") else {}
        # Without the mark of a checksum it is an entry of an earlier version, whose reader checks what it holds.
        assert kept.get("score") in (0.5, None)
        file.write_bytes(mutated(content, mutations))
        opened = VectorStore(tmp_path / "vectors")
        for key, row in zip(keys, rows, strict=True):
            if key in opened:
                np.testing.assert_array_equal(opened.get([key])[0], row)

    search(examples, MUTATIONS, one)
