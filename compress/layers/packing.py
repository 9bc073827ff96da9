"""Packing of unsigned integers of 1 to 8 bits without gaps. Needs only numpy, so that runtimes without torch can read a variant."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_width(count: int, bits: int) -> int:
    """Return the bytes of a row of `count` values."""
    return -(-count * bits // 8)


def pack(values: Bytes, bits: int) -> Bytes:
    """Pack rows of values: uint8 [rows, n], each below 2^bits, to uint8 [rows, ceil(n x bits / 8)].

    Value i starts at bit i x bits of its row; the first value is in the lowest bits of the first byte. A row is padded with zero
    bits to a whole byte. Eight values take `bits` bytes, so rows of any length are read eight values at a time.

    Raises:
        ValueError: a value does not fit, or `bits` is not 1 to 8.
    """
    _check(bits)
    if values.size and int(values.max()) >> bits:
        raise ValueError(f"{int(values.max())} does not fit into {bits} bits")
    if bits == 8:
        return values.copy()
    rows, count = values.shape
    padded = np.zeros((rows, -(-count // 8), 8), dtype=np.uint8)
    padded.reshape(rows, -1)[:, :count] = values
    # Eight values make a word of 8 x bits bits; its low bytes are stored in order.
    words = np.zeros(padded.shape[:2], dtype=np.uint64)
    for place in range(8):
        words |= padded[:, :, place].astype(np.uint64) << np.uint64(place * bits)
    stored = np.stack([(words >> np.uint64(8 * place)).astype(np.uint8) for place in range(bits)], axis=-1)
    return np.ascontiguousarray(stored.reshape(rows, -1)[:, : packed_width(count, bits)])


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """Unpack what `pack` returned: uint8 [rows, ceil(count x bits / 8)] to uint8 [rows, count].

    Raises:
        ValueError: the width of the rows does not match `count` values, or `bits` is not 1 to 8.
    """
    _check(bits)
    rows, width = packed.shape
    if width != packed_width(count, bits):
        raise ValueError(f"rows have {width} bytes; {count} values of {bits} bits take {packed_width(count, bits)}")
    if bits == 8:
        return packed.copy()
    padded = np.zeros((rows, -(-count // 8) * bits), dtype=np.uint8)
    padded[:, :width] = packed
    words = np.zeros((rows, padded.shape[1] // bits), dtype=np.uint64)
    for place in range(bits):
        words |= padded[:, place::bits].astype(np.uint64) << np.uint64(8 * place)
    mask = np.uint64(2**bits - 1)
    values = np.stack([((words >> np.uint64(place * bits)) & mask).astype(np.uint8) for place in range(8)], axis=-1)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :count])


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
