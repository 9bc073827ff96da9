"""Search the Parquet parts of `compress encode` in FAISS, LanceDB, Qdrant and DuckDB.

    compress encode minilm documents.jsonl -o vectors/ --task document
    python examples/vector_stores.py minilm vectors/ "who repairs the lift?"

Vectors are stored as float32, float16, int8 or bits (`--vector-format`). None is turned back into floats where the store can search
what was written:

- An int8 code stands for `scale * code + offset`, one of each per dimension. So `query . vector` is `(query * scale) . code` plus a
  number that is the same for all documents: the codes are searched as they are, with the query times the scale.
- A bit says whether a value is above its dimension's threshold. Bits are compared by how many differ (Hamming distance).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import compress


@dataclass(frozen=True)
class Vectors:
    """What `compress encode` wrote into a folder."""

    folder: Path
    table: pa.Table
    """Columns `id` and `vector`, a fixed-size list."""
    dimension: int
    """Width of the model's vectors."""
    format: str
    """float32, float16, int8 or binary."""
    similarity: str
    """How the model's vectors are compared: cosine or dot."""
    scale: np.ndarray | None
    """Of int8: what a code is multiplied by, float32 [dimension]."""
    threshold: np.ndarray | None
    """Of binary: from where on a bit is set, float32 [dimension]."""

    @classmethod
    def read(cls, folder: Path) -> Vectors:
        """Read all parts of a folder."""
        table = pa.concat_tables(pq.read_table(part) for part in sorted(folder.glob("part-*.parquet")))
        said = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}

        def numbers(key: str) -> np.ndarray | None:
            return np.array(json.loads(said[key]), dtype=np.float32) if key in said else None

        return cls(
            folder,
            table,
            int(said["compress.dimension"]),
            said["compress.vector_format"],
            said.get("compress.similarity", "cosine"),
            numbers("compress.scale"),
            numbers("compress.threshold"),
        )

    @property
    def stored(self) -> np.ndarray:
        """The vectors as they are stored, [n, dimension], or [n, dimension / 8] of bits."""
        column = self.table["vector"].combine_chunks()
        return column.values.to_numpy(zero_copy_only=False).reshape(len(column), -1)

    @property
    def ids(self) -> list[Any]:
        """The id of each vector."""
        return self.table["id"].to_pylist()

    def query(self, vector: np.ndarray) -> np.ndarray:
        """Return a query's vector, float32 [dimension], in the form in which it is compared with what is stored."""
        if self.format == "binary":
            assert self.threshold is not None
            return np.packbits(vector > self.threshold)
        return vector if self.scale is None else vector * self.scale


def in_faiss(vectors: Vectors, query: np.ndarray, top: int) -> list[Any]:
    """Search with FAISS: integers and bits stay what they are."""
    import faiss

    stored, asked = vectors.stored, vectors.query(query)[None]
    if vectors.format == "binary":
        index = faiss.IndexBinaryFlat(vectors.dimension)
    elif vectors.format == "int8":
        index = faiss.IndexScalarQuantizer(
            vectors.dimension, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT
        )
        stored = stored.astype(np.float32)  # whole numbers, which it stores in a byte each
        asked = asked * (127 / np.abs(asked).max())  # it rounds the query to whole numbers too
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if vectors.format == "float16" else None
        flat, inner = vectors.dimension, faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexFlatIP(flat) if kind is None else faiss.IndexScalarQuantizer(flat, kind, inner)
        stored = stored.astype(np.float32)
    index.add(np.ascontiguousarray(stored))
    _, found = index.search(np.ascontiguousarray(asked), top)
    ids = vectors.ids
    return [ids[row] for row in found[0]]


def in_lancedb(vectors: Vectors, query: np.ndarray, top: int) -> list[Any]:
    """Search with LanceDB: floats by dot product, bits by Hamming distance. It has no search of int8, so codes become float16."""
    import lancedb

    table = vectors.table.replace_schema_metadata(None)
    if vectors.format == "int8":
        codes = pa.FixedSizeListArray.from_arrays(pa.array(vectors.stored.astype(np.float16).ravel()), vectors.dimension)
        table = table.set_column(table.schema.get_field_index("vector"), "vector", codes)
    database = lancedb.connect(vectors.folder / "lance")
    stored = database.create_table("documents", table, mode="overwrite")
    metric = "hamming" if vectors.format == "binary" else "dot"
    asked = vectors.query(query)
    search = stored.search(asked if vectors.format == "binary" else asked.astype(np.float32), vector_column_name="vector")
    return search.distance_type(metric).limit(top).to_arrow()["id"].to_pylist()


def in_qdrant(vectors: Vectors, query: np.ndarray, top: int) -> list[Any]:
    """Search with Qdrant in this process. It takes floats and unsigned bytes; bits become -1 and 1, whose product counts them.

    A server keeps bytes as bytes (`datatype`), and makes bits of floats itself (`BinaryQuantization`).
    """
    from qdrant_client import QdrantClient, models

    stored, asked = vectors.stored, vectors.query(query)
    datatype = models.Datatype.FLOAT32
    if vectors.format == "int8":  # code + 128: every score moves by the same number
        stored, datatype = stored.astype(np.int16) + 128, models.Datatype.UINT8
    elif vectors.format == "binary":
        stored = np.unpackbits(stored, axis=1, count=vectors.dimension).astype(np.float32) * 2 - 1
        asked = np.unpackbits(asked, count=vectors.dimension).astype(np.float32) * 2 - 1
    client = QdrantClient(":memory:")
    size = models.VectorParams(size=vectors.dimension, distance=models.Distance.DOT, datatype=datatype)
    client.create_collection("documents", vectors_config=size)
    payload = [{"id": id} for id in vectors.ids]  # its own ids are numbers or UUIDs
    client.upload_collection("documents", vectors=stored.astype(np.float32), payload=payload, ids=range(len(payload)))
    found = client.query_points("documents", query=asked.astype(np.float32).tolist(), limit=top).points
    return [point.payload["id"] for point in found if point.payload]


def in_duckdb(vectors: Vectors, query: np.ndarray, top: int) -> list[Any]:
    """Search with DuckDB, in the Parquet files where they lie."""
    import duckdb

    files = str(vectors.folder / "part-*.parquet")
    asked = vectors.query(query)
    if vectors.format == "binary":
        differing = "list_sum(list_transform(list_zip(vector, $query::UTINYINT[]), lambda pair: bit_count(xor(pair[1], pair[2]))))"
        order = f"{differing} ASC"
    else:
        size = vectors.dimension
        order = f"array_inner_product(vector::FLOAT[{size}], $query::FLOAT[{size}]) DESC"
    sql = f"SELECT id FROM read_parquet($files) ORDER BY {order} LIMIT {top}"
    return [row[0] for row in duckdb.execute(sql, {"files": files, "query": asked.tolist()}).fetchall()]


STORES: Mapping[str, Callable[[Vectors, np.ndarray, int], list[Any]]] = {
    "faiss": in_faiss,
    "lancedb": in_lancedb,
    "qdrant_client": in_qdrant,
    "duckdb": in_duckdb,
}
"""By the name of the package to import."""


def main(model: str, folder: str, text: str, top: int = 5) -> None:
    """Search a folder with a text in every store that is installed."""
    vectors = Vectors.read(Path(folder))
    query = compress.load(model).encode([text], task="query")[0]
    for name, search in STORES.items():
        try:
            print(f"{name}: {search(vectors, query, top)}")
        except ModuleNotFoundError as error:
            print(f"{name}: not installed ({error.name})")


if __name__ == "__main__":
    main(*sys.argv[1:4])
