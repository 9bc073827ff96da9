"""Checkpoints on disk: safetensors headers and fingerprints, read without torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from compress.common.errors import UserError
from compress.common.inputs import checked, checked_by, inside, open_file, parse_json, read_json

HEADER_BYTES = 100_000_000
"""Longest header, which is also the bound of the safetensors library."""
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


MASK = "_mask"
"""Suffix of the bitmask tensor that says which entries of a matrix are not zero; see `compress.layers.bitmask`."""


_FARTHEST = 10**12 - 1
"""The offset that takes the most digits, in a file of up to a terabyte."""
BARE_BYTES = 64
"""Most bytes of a file without tensors: the header's length, its metadata and the spaces that fill it up to eight bytes."""


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

    def file_bytes(self, name: str) -> int:
        """Most bytes that the tensor adds to a file: those of `bytes`, and its entry in the header, its bitmask's too."""
        entry = {name: {"dtype": self.dtype, "shape": self.shape, "data_offsets": [_FARTHEST, _FARTHEST]}}
        length = len(json.dumps(entry, separators=(",", ":")).encode())
        return self.bytes + length + (length + len(MASK) if self.density < 1 else 0)


class _Entry(BaseModel):
    """A tensor in a safetensors header."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...] = Field(strict=False)
    data_offsets: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = Field(strict=False)


class _Index(BaseModel):
    """A safetensors index; other keys, such as `metadata`, say nothing of where a tensor is."""

    weight_map: dict[str, str]


_ENTRIES = TypeAdapter(dict[str, _Entry])

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
    return checked(read_json(path), _Index, str(path), "download the model again").weight_map


def _inside(folder: Path, name: str) -> Path:
    path = inside(folder, name, f"{folder / INDEX_FILE}: weight_map")
    if Path(name).name != name:
        raise UserError(f"{folder / INDEX_FILE}: weight_map: {name!r} is not a file of this folder")
    if not path.exists():
        raise UserError(f"{path}: missing, although {INDEX_FILE} names it", "download the model again")
    return path


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
    if not found:
        raise UserError(f"{', '.join(map(str, weight_files(folder)))}: holds no tensors", "download or write it again")
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
    again = "download or write it again"
    with open_file(path) as file:
        size, start = path.stat().st_size, file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size:
            what = "it has no length of its header" if len(start) < 8 else "the header is longer than the file"
            raise UserError(f"{path}: not a complete safetensors file ({what})", again)
        if length > HEADER_BYTES:
            raise UserError(f"{path}: its header has {length:,} bytes, more than the {HEADER_BYTES:,} of the format", again)
        content = file.read(length)
    tensors = _entries(path, content, 8 + length)
    expected = 8 + length + sum(tensor.bytes for tensor in tensors.values())
    if size != expected:
        raise UserError(f"{path}: the file has {size:,} bytes, its header needs {expected:,}", again)
    return tensors


def _entries(path: Path, header: bytes, start: int) -> dict[str, TensorInfo]:
    """Return the tensors of a header, whose data begins at byte `start`.

    Raises:
        UserError: the header is not one, or its tensors do not lie one after another, each with the bytes that its shape takes.
    """
    try:
        content: Any = parse_json(header.decode("utf-8"), f"{path}: header")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a safetensors file (its header is not UTF-8)", "download or write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a safetensors file (its header is a {type(content).__name__})", "download or write it again")
    content.pop("__metadata__", None)
    entries = checked_by(content, _ENTRIES, f"{path}: header", "download or write it again")
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        if entry.dtype not in DTYPE_BYTES:
            raise UserError(f"{path}: {name}: dtype {entry.dtype!r} is not known", f"known: {', '.join(DTYPE_BYTES)}")
        first, last = entry.data_offsets
        if first != end or last - first != math.prod(entry.shape) * DTYPE_BYTES[entry.dtype]:
            why = f"data_offsets {first:,} to {last:,} do not follow {end:,} with the bytes of {entry.dtype} {list(entry.shape)}"
            raise UserError(f"{path}: {name}: {why}", "download or write it again")
        end = last
    return {name: TensorInfo(entry.dtype, entry.shape, offset=start + entry.data_offsets[0]) for name, entry in entries.items()}


TOKENIZER_FILES = ("*.txt", "*.model", "*.tiktoken", "*.codes")
"""Files of tokenizers that are not JSON: word lists, merges, SentencePiece models and those of tiktoken and PhoBERT."""


def fingerprint(folder: Path, transformer: Path) -> str:
    """Return the first 16 hex digits of a SHA-256 over a model's weights, configs and tokenizer.

    Args:
        folder: the model's folder.
        transformer: the network's own folder: `folder` itself, or one inside it.
    """
    digest = hashlib.sha256()
    names = {
        *weight_files(transformer),
        *(path for place in (folder, transformer) for kind in ("*.json", *TOKENIZER_FILES) for path in place.glob(kind)),
        *folder.glob("*/config.json"),
        *folder.glob("*/model.safetensors"),
    }
    for path in sorted(names):
        digest.update(str(path.relative_to(folder)).encode())
        with open_file(path) as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
