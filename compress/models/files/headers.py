"""Checkpoints on disk: safetensors headers and fingerprints, read without torch."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path

from compress.common.errors import UserError

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


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's folder.

    Raises:
        UserError: there are none. Pickles (`.bin`, `.pt`) are never opened.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.pkl") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder}: holds only pickled weights ({', '.join(pickles)}), which can run code when opened",
            "convert them to safetensors first (transformers: model.save_pretrained(folder))",
        )
    raise UserError(
        f"{folder}: no *.safetensors file",
        "a model's folder holds config.json, tokenizer files and safetensors weights",
    )


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
    names = {*weight_files(transformer), *folder.glob("*.json"), *transformer.glob("*.json"), *folder.glob("*/config.json")}
    for path in sorted(names):
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
