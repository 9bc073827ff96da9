"""Sparse matrices as a bitmask and the values that are left."""

from __future__ import annotations

import pytest
import torch

from compress.layers.bitmask import decode, encode


@pytest.mark.parametrize("width", [1, 7, 8, 48, 51])
def test_a_matrix_taken_apart_is_put_together_again(width: int) -> None:
    matrix = torch.randn(5, width).half() * (torch.rand(5, width) > 0.5)
    bits, values = encode(matrix)
    assert bits.shape == (5, -(-width // 8))
    assert len(values) == int((matrix != 0).sum())
    assert torch.equal(decode(bits, values, width), matrix)
    with pytest.raises(ValueError, match="are stored"):
        decode(bits, torch.cat((values, values.new_ones(1))), width)
    assert encode(torch.tensor([[0, 5, 0, 0, 0, 0, 0, 0, 7]]))[0].tolist() == [[2, 1]]  # the first value is the lowest bit
