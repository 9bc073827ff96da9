"""Matrices with many zeros as they are stored: a bit for every value, and the values that are not zero."""

from __future__ import annotations

import numpy as np
import torch


def encode(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Take a matrix [rows, n] apart: uint8 [rows, ceil(n / 8)], bit i of a row in byte i // 8 from the lowest on, and its values
    [count] that are not zero, row after row."""
    kept = matrix != 0
    bits = np.packbits(kept.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits).to(matrix.device), matrix[kept]


def decode(bits: torch.Tensor, values: torch.Tensor, width: int) -> torch.Tensor:
    """Return the matrix, [rows, width], that `encode` took apart.

    Raises:
        ValueError: there are more or fewer values than bits that say so.
    """
    kept = torch.from_numpy(np.unpackbits(bits.cpu().numpy(), axis=1, count=width, bitorder="little")).bool()
    if int(kept.sum()) != len(values):
        raise ValueError(f"{int(kept.sum())} values are to be placed and {len(values)} are there")
    matrix = torch.zeros(kept.shape, dtype=values.dtype, device=values.device)
    matrix[kept.to(values.device)] = values
    return matrix
