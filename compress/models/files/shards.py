"""Writes a variant's weights: one shard per segment, each written atomically, joined into a single file if the variant is small."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.common.files import replacing, write_text_atomic
from compress.layers.bitmask import encode
from compress.models.architectures import is_block_linear
from compress.models.files.headers import INDEX_FILE, MASK, read_header
from compress.models.files.variant import WEIGHTS_FILE

# Size up to which the shards of a variant are joined into a single file.
SINGLE_FILE_BYTES = 2 * 10**9


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})


def sparse(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with each linear layer's matrix stored as bitmask and nonzero values, if that makes it smaller.

    The values keep the name `weight`; the bitmask is called `weight_mask`.
    """
    made = dict(tensors)
    for name, tensor in tensors.items():
        if not is_block_linear(name, tensor.dim()) or tensor.dtype not in (torch.float16, torch.int8):
            continue
        bits, values = encode(tensor)
        if bits.nbytes + values.nbytes < tensor.nbytes:
            made[name], made[name + MASK] = values, bits
    return made


def shard(folder: Path, index: int, count: int) -> Path:
    """Return the path of shard `index` (from 0) of `count`, named as on the hub."""
    return folder / f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def join_shards(folder: Path, count: int, single_file_bytes: int = SINGLE_FILE_BYTES) -> None:
    """Make a folder's shards loadable: join them into one file up to `single_file_bytes`, else write an index for them.

    If it is interrupted, it can be called again.
    """
    paths = [shard(folder, index, count) for index in range(count)]
    whole = folder / WEIGHTS_FILE
    if not whole.exists():
        headers = {path: read_header(path) for path in paths}
        total = sum(info.bytes for header in headers.values() for info in header.values())
        if total > single_file_bytes:
            places = {name: path.name for path, header in headers.items() for name in header}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_text_atomic(folder / INDEX_FILE, json.dumps(index, indent=1) + "\n")
            return
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  safe_open is no mapping
        write_tensors(whole, tensors)
    for path in paths:
        path.unlink(missing_ok=True)
