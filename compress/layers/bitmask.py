"""Storage of sparse matrices: a bitmask with a bit for every value, and the values that are not zero."""

from __future__ import annotations

import numpy as np
import torch


def encode(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a matrix [rows, n] into a bitmask, uint8 [rows, ceil(n / 8)], and its values that are not zero, [count], row by row.

    Bit i of a row is in byte i // 8, lowest bit first.
    """
    kept = matrix != 0
    bits = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits).to(matrix.device), matrix[kept]


def decode(bits: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """Return the matrix, [rows, width], that `encode` was given.

    Raises:
        ValueError: the number of values differs from the number of bits that are set.
    """
    kept = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1, count=width, bitorder="little")).bool()
    if int(kept.sum()) != len(values):
        raise ValueError(f"the bitmask has {int(kept.sum())} values, {len(values)} are stored")
    matrix = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    matrix[kept.to(values.device)] = values
    return matrix
