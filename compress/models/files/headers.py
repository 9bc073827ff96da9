"""Checkpoints on disk: safetensors headers and fingerprints, read without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

from compress.common.errors import UserError
from compress.common.inputs import read_json

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


MASK = "_mask"
"""Suffix of the bitmask tensor that says which entries of a matrix are not zero; see `compress.layers.bitmask`."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it."""

    dtype: str
    """Name of the dtype in safetensors, such as `F16`."""
    shape: tuple[int, ...]
    """The tensor's shape."""
    density: float = 1.0
    """Share of the entries that are not zero. A sparse matrix is stored as a bitmask and its nonzero values."""
    offset: int | None = field(default=None, compare=False)
    """Position of the tensor's first byte in its file; None if it was not read from one."""

    @property
    def parameters(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size on disk in bytes; for a sparse matrix, of the smaller of the two ways to store it."""
        item = DTYPE_BYTES[self.dtype]
        if self.density == 1 or len(self.shape) != 2:
            return self.parameters * item
        rows, width = self.shape
        return min(self.parameters * item, rows * -(-width // 8) + round(self.density * self.parameters) * item)


INDEX_FILE = "model.safetensors.index.json"
_WHOLE = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a network's weights, as transformers chooses them: one file, or those of an index.

    Other safetensors files next to them (another precision, a merged copy, a shard that the index does not name) are not read.

    Raises:
        UserError: there is none, or which ones they are cannot be told; pickles (`.bin`, `.pt`) are never opened.
    """
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / INDEX_FILE).exists():
        return [_inside(folder, name) for name in sorted(set(read_index(folder).values()))]
    files = sorted(folder.glob("*.safetensors"))
    shards = [found for path in files if (found := _WHOLE.fullmatch(path.name))]
    if shards and len(shards) == int(shards[0].group(2)):
        return [folder / found.group(0) for found in shards]
    if files:
        names = ", ".join(path.name for path in files)
        raise UserError(
            f"{folder}: no model.safetensors and no {INDEX_FILE}; which of {names} holds the weights cannot be told",
            "name it model.safetensors",
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: holds only pickled weights ({', '.join(pickles)}), which can run code when opened",
            f"write them as safetensors first: compress convert {folder} --to FOLDER",
        )
    raise UserError(
        f"{folder}: no *.safetensors file",
        "a model's folder holds config.json, tokenizer files and safetensors weights",
    )


def read_index(folder: Path) -> dict[str, str]:
    """Return which file of a folder holds each tensor, as its index says; empty where there is none.

    Raises:
        UserError: the index is not one.
    """
    path = folder / INDEX_FILE
    if (folder / "model.safetensors").exists() or not path.exists():
        return {}
    try:
        places: dict[str, str] = dict(read_json(path)["weight_map"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: weight_map: missing, or not a table of tensors and their files") from error
    return places


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise UserError(f"{folder / INDEX_FILE}: weight_map: {name!r} is not a file of this folder")
    if not (folder / name).exists():
        raise UserError(f"{folder / name}: missing, although {INDEX_FILE} names it", "download the model again")
    return folder / name


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

    path: Path
    name: str
    """Its name in the file."""
    info: TensorInfo
    first_row: int = 0
    """First row of the file's tensor, of which this may be a range of rows: of fused projections, for example."""

    def read(self) -> bytes:
        """Read its bytes."""
        assert self.info.offset is not None, "the header gave it"
        with self.path.open("rb") as file:
            file.seek(self.info.offset)
            return file.read(self.info.bytes)


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name; no tensor is read."""
    return {name: StoredTensor(path, name, info) for name, info in read_header(path).items()}


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a network's weight files by name; no tensor is read.

    Raises:
        UserError: as `weight_files`; or two files hold a tensor and no index says which one counts.
    """
    places, found = read_index(folder), dict[str, StoredTensor]()
    for path in weight_files(folder):
        for name, tensor in tensors_in(path).items():
            if places and places.get(name) != path.name:
                continue
            if name in found:
                raise UserError(f"{folder}: tensor {name!r} is in {found[name].path.name} and in {path.name}")
            found[name] = tensor
    missing = next((name for name in places if name not in found), None)
    if missing is not None:
        raise UserError(f"{folder / places[missing]}: tensor {missing!r} is missing, although {INDEX_FILE} names it")
    return found


def weight_bytes(folder: Path) -> int:
    """Return the size of a folder's safetensors files in bytes."""
    return sum(path.stat().st_size for path in weight_files(folder))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file, and no tensor.

    Returns:
        The file's tensors by name.

    Raises:
        UserError: the file is truncated or is not safetensors.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error})", "download or write it again") from error
    tensors = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), offset=8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
    expected = 8 + length + sum(tensor.bytes for tensor in tensors.values())
    if path.stat().st_size != expected:
        raise UserError(
            f"{path}: the file has {path.stat().st_size:,} bytes, its header needs {expected:,}",
            "download or write it again",
        )
    return tensors


def fingerprint(folder: Path, transformer: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a model's weights, configs and tokenizer.

    Args:
        folder: the model's folder.
        transformer: the network's own folder: `folder` itself, or one inside it.
    """
    digest = hashlib.sha256()
    names = {
        *weight_files(transformer),
        *folder.glob("*.json"),
        *transformer.glob("*.json"),
        *folder.glob("*/config.json"),
        *folder.glob("*/model.safetensors"),
    }
    for path in sorted(names):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
