"""Packed integers come back as they were, for every width and any shape, in numpy and in torch alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.layers import packing, torch_packing


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31, 33, 64, 385])
def test_round_trip(bits: int, count: int) -> None:
    values = np.random.default_rng(bits * 1000 + count).integers(0, 2**bits, (5, count), dtype=np.uint8)
    packed = packing.pack(values, bits)
    assert packed.shape == (5, -(-count * bits // 8))
    np.testing.assert_array_equal(packing.unpack(packed, bits, count), values)
    in_torch = torch_packing.pack(torch.from_numpy(values), bits)
    np.testing.assert_array_equal(in_torch.numpy(), packed)
    np.testing.assert_array_equal(torch_packing.unpack(in_torch, bits, count).numpy(), values)


def test_the_layout_is_one_stream_of_bits_lowest_first() -> None:
    values = np.array([[1, 2, 3, 4, 5, 6, 7, 0, 5]], dtype=np.uint8)
    stream = sum(int(value) << 3 * place for place, value in enumerate(values[0]))
    assert packing.pack(values, 3)[0].tolist() == list(stream.to_bytes(4, "little"))
    assert packing.pack(np.array([[1, 15, 9]], dtype=np.uint8), 4).tolist() == [[0xF1, 0x09]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="8 does not fit into 3 bits"):
        packing.pack(np.array([[8]], dtype=np.uint8), 3)
    with pytest.raises(ValueError, match="rows have 3 bytes; 5 values of 3 bits take 2"):
        packing.unpack(np.zeros((1, 3), dtype=np.uint8), 3, 5)
    with pytest.raises(ValueError, match="bits must be 1 to 8"):
        packing.pack(np.zeros((1, 1), dtype=np.uint8), 9)
