"""Small data sets in the layouts that tasks have on the hub, of the embedded suite's texts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import pyarrow as pa
import pyarrow.parquet as pq
from standin import StandIn

from compress.data.texts import SUITE, read_jsonl

CONFIGS = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: qrels/train.jsonl
  - split: test
    path: qrels/test.jsonl
- config_name: corpus
  data_files:
  - split: corpus
    path: corpus.jsonl
- config_name: queries
  data_files:
  - split: queries
    path: queries.jsonl
---
"""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def add_sts_benchmark(hub: StandIn, folder: Path) -> None:
    """Serve STSBenchmark under the name and the revision that mteb pins: a gzipped file of JSON lines for each split."""
    rows = read_jsonl(SUITE / "MiniSTS" / "test.jsonl")
    for split in ("train", "validation", "test"):
        write_lines(folder / f"{split}.jsonl.gz", rows)
    _add(hub, "STSBenchmark", folder)


def add_scifact(hub: StandIn, folder: Path) -> None:
    """Serve SciFact under the name and the revision that mteb pins: BEIR's files, named by the card's configs."""
    place = SUITE / "MiniRetrieval"
    (folder / "qrels").mkdir(parents=True)
    (folder / "README.md").write_text(CONFIGS)
    for file in ("corpus.jsonl", "queries.jsonl"):
        (folder / file).write_bytes((place / file).read_bytes())
    lines = [line.split("\t") for line in (place / "qrels" / "test.tsv").read_text().splitlines()[1:]]
    qrels = [{"query-id": query, "corpus-id": document, "score": float(score)} for query, document, score in lines]
    for split in ("train", "test"):
        write_lines(folder / "qrels" / f"{split}.jsonl", qrels)
    _add(hub, "SciFact", folder)


def add_texts(hub: StandIn, folder: Path, texts: Sequence[str]) -> None:
    """Serve texts as parquet in two parts, as data sets are uploaded today: `hub:owner/texts:text`."""
    rows = [{"text": text, "number": number} for number, text in enumerate(texts)]
    for part, half in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
        write_parquet(folder / "data" / f"train-{part:05d}-of-00002.parquet", half)
    hub.add("datasets", "owner/texts", folder)


def _add(hub: StandIn, task: str, folder: Path) -> None:
    pinned = mteb.get_task(task).metadata.dataset
    hub.add("datasets", pinned["path"], folder, commit=pinned["revision"])
