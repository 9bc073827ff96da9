"""Recall of int8 and binary vectors next to float in FAISS, LanceDB, Qdrant and DuckDB.

    python benchmarks/vector_stores.py            # writes results/vector-stores/recall.json
    python docs/measured.py                       # writes the table of docs/vector-stores.md from it

Documents and queries are those of the embedded suite's retrieval. The Parquet parts are made as `compress encode` makes them; codes
and bits are fitted on the embedded calibration texts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import compress
from compress.common.machine import machine, versions
from compress.data.texts import SUITE, calibration_texts, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "stores")]

import vector_stores  # noqa: E402
from stores_support import write_parts  # noqa: E402

TARGET = ROOT / "results" / "vector-stores" / "recall.json"
PACKAGES = {"faiss": "faiss-cpu", "lancedb": "lancedb", "qdrant_client": "qdrant-client", "duckdb": "duckdb"}
TOP = 10


def main(model: str) -> None:
    """Measure and write the record."""
    embedder, folder = compress.load(model, device="cpu"), SUITE / "MiniRetrieval"
    documents = read_jsonl(folder / "corpus.jsonl", ("text",))
    ids = [str(row["_id"]) for row in documents]
    vectors = embedder.encode([f"{row.get('title', '')} {row['text']}".strip() for row in documents], task="document")
    queries = embedder.encode([row["text"] for row in read_jsonl(folder / "queries.jsonl", ("text",))], task="query")
    calibration = embedder.encode(calibration_texts(), task="document")
    nearest = [{ids[row] for row in np.argsort(-(vectors @ query))[:TOP]} for query in queries]
    recall: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for format in ("float32", "float16", "int8", "binary"):
            stored = vector_stores.Vectors.read(write_parts(Path(temporary) / format, ids, vectors, format, calibration))
            for store, search in vector_stores.STORES.items():
                found = [set(search(stored, query, TOP)) for query in queries]
                shares = [len(one & other) / TOP for one, other in zip(found, nearest, strict=True)]
                recall.setdefault(store, {})[format] = float(np.mean(shares))
                print(f"{store} {format}: {recall[store][format]:.4f}")
    record = {
        "model": model,
        "documents": len(ids),
        "queries": len(queries),
        "top": TOP,
        "recall": recall,
        "stores": {name: importlib.metadata.version(package) for name, package in PACKAGES.items()},
        "versions": versions(),
        "machine": machine(None).model_dump(),
    }
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    main(parser.parse_args().model)
