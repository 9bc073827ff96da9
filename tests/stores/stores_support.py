"""Parquet parts as `compress encode` writes them, made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compress.measure.vectors.codec import VectorCodec, VectorFormat

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "binary": np.uint8}


def write_parts(folder: Path, ids: list[str], vectors: np.ndarray, format: str, calibration: np.ndarray, parts: int = 3) -> Path:
    """Write vectors, float32 [n, dimension], in a format into parts with the metadata of `compress encode`."""
    folder.mkdir(parents=True)
    said = {"fingerprint": "0", "dimension": str(vectors.shape[1]), "vector_format": format, "similarity": "cosine", "prompt": ""}
    stored = vectors.astype(DTYPES[format]) if format.startswith("float") else np.empty(0)
    if format in ("int8", "binary"):
        codec = VectorCodec(VectorFormat.parse(format), calibration)
        stored = codec.encode(vectors)
        if format == "int8":  # the codec's codes are from 0 to 255
            stored = (stored.astype(np.int16) - 128).astype(np.int8)
            said |= {"scale": json.dumps(codec._step.tolist()), "offset": json.dumps((codec._low + 128 * codec._step).tolist())}
        else:
            said["threshold"] = json.dumps(codec._median.tolist())
    metadata = {f"compress.{key}": value for key, value in said.items()}
    for number, rows in enumerate(np.array_split(np.arange(len(ids)), parts)):
        column = pa.FixedSizeListArray.from_arrays(pa.array(stored[rows].ravel()), stored.shape[1])
        table = pa.table({"id": [ids[row] for row in rows], "vector": column}).replace_schema_metadata(metadata)
        pq.write_table(table, folder / f"part-{number:05d}.parquet")
    return folder
