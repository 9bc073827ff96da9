"""`docs/vector-stores.md` and `examples/vector_stores.py`: the Parquet of `compress encode` in vector stores, searched with a query."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stores_support import write_parts

import compress
from compress.data.texts import calibration_texts, suite_texts

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import vector_stores  # noqa: E402

FORMATS = ("float32", "float16", "int8", "binary")
LOWEST = {"float32": 1.0, "float16": 0.99, "int8": 0.95, "binary": 0.6}
"""Recall of the ten nearest documents of float32 vectors."""
QUERIES = 20


@pytest.fixture(scope="module")
def documents() -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Ids, nano's vectors of documents and of queries, and those that formats are fitted on."""
    nano, texts = compress.load("nano", device="cpu"), list(suite_texts()[:620])
    vectors = nano.encode(texts, task="document")
    queries = nano.encode([text.upper() + " please" for text in texts[100 : 100 + QUERIES]], task="query")
    return [f"doc-{number}" for number in range(len(texts))], vectors, queries, nano.encode(calibration_texts())


@pytest.fixture(scope="module")
def folders(documents: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    ids, vectors, _, calibration = documents
    root = tmp_path_factory.mktemp("vectors")
    return {format: write_parts(root / format, ids, vectors, format, calibration) for format in FORMATS}


def exact(documents: Any) -> list[list[str]]:
    """The ten nearest documents of each query, by float32 vectors."""
    ids, vectors, queries, _ = documents
    return [[ids[row] for row in np.argsort(-(vectors @ query))[:10]] for query in queries]


def recall(search: Callable[..., list[Any]], stored: vector_stores.Vectors, documents: Any) -> float:
    found = (search(stored, query, 10) for query in documents[2])
    return float(np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact(documents), strict=True)]))


@pytest.mark.parametrize("store", vector_stores.STORES)
@pytest.mark.parametrize("format", FORMATS)
def test_a_store_finds_what_the_floats_find(folders: dict[str, Path], documents: Any, store: str, format: str) -> None:
    pytest.importorskip(store, reason=f"{store} is not installed; the extra `stores` has it")
    stored = vector_stores.Vectors.read(folders[format])
    assert (stored.format, stored.dimension, len(stored.ids)) == (format, 384, 620)
    found = recall(vector_stores.STORES[store], stored, documents)
    assert found >= LOWEST[format] - (0.03 if store == "faiss" and format == "int8" else 0)
    if format == "binary":
        bits = np.packbits(documents[2] > stored.threshold, axis=1)
        distances = [np.unpackbits(stored.stored ^ own, axis=1).sum(axis=1) for own in bits]
        counted = [{stored.ids[row] for row in np.argsort(one, kind="stable")[:10]} for one in distances]
        by_hand = np.mean([len(one & set(other)) / 10 for one, other in zip(counted, exact(documents), strict=True)])
        assert found == pytest.approx(by_hand, abs=0.03)  # equal distances come in any order


def test_codes_are_found_with_their_scale_alone(folders: dict[str, Path], documents: Any) -> None:
    pytest.importorskip("duckdb", reason="duckdb is not installed; the extra `stores` has it")
    stored = vector_stores.Vectors.read(folders["int8"])
    # A model with dimensions of very different ranges, whose codes mislead without the scales.
    ids, vectors, queries, calibration = documents
    stretch = np.geomspace(0.1, 10, 384, dtype=np.float32)
    other = (ids, vectors * stretch, queries * stretch, calibration * stretch)
    folder = write_parts(folders["int8"].with_name("stretched"), ids, other[1], "int8", other[3])
    stored = vector_stores.Vectors.read(folder)
    unit = (ids, other[1] / np.linalg.norm(other[1], axis=1, keepdims=True), *other[2:])
    right = recall(vector_stores.in_duckdb, stored, unit)
    wrong = recall(vector_stores.in_duckdb, replace(stored, scale=None), unit)
    assert right > 0.9 > wrong


@pytest.mark.slow
def test_the_example_searches_every_store_that_is_there(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    vector_stores.main("nano", str(folders["float32"]), suite_texts()[5])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(vector_stores.STORES)
    for line in said:
        assert "not installed" in line or "['doc-5'" in line


def test_the_page_shows_the_functions_of_the_example() -> None:
    page = (ROOT / "docs" / "vector-stores.md").read_text(encoding="utf-8")
    source = (ROOT / "examples" / "vector_stores.py").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    assert len(shown) == len(vector_stores.STORES)
    for block in shown:
        assert block in source
