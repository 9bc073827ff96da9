"""`compress.layers.packing` in torch, for layers that unpack their weights at run time, on any device."""

from __future__ import annotations

import torch

from compress.layers import packing


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of unsigned integers: uint8 [rows, n] to uint8 [rows, ceil(n x bits / 8)]; see `packing.pack`."""
    if bits == 4 and values.shape[1] % 2 == 0:
        return values[:, ::2] | values[:, 1::2] << 4
    return torch.from_numpy(packing.pack(values.cpu().numpy(), bits)).to(values.device)


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Unpack rows of unsigned integers: uint8 [rows, ceil(count x bits / 8)] to uint8 [rows, count]; see `packing.unpack`."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :count]
    rows = packed.shape[0]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits))
    words = torch.zeros(rows, padded.shape[1] // bits, dtype=torch.int64, device=packed.device)
    for place in range(bits):
        words |= padded[:, place::bits].long() << 8 * place
    mask = 2**bits - 1
    return torch.stack([((words >> place * bits) & mask).to(torch.uint8) for place in range(8)], dim=-1).flatten(1)[:, :count]


def words(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows without gaps into 32-bit words: uint8 [rows, n] to int32 [rows, ceil(n x bits / 32)], the first value lowest.

    This is our own packing, padded to whole words.
    """
    packed = pack(integers, bits)
    # Copy into a new tensor: the strides of a single row may not allow a view as words.
    filled = packed.new_zeros(packed.shape[0], -(-packed.shape[1] // 4) * 4)
    filled[:, : packed.shape[1]] = packed
    return filled.view(torch.int32)
