"""Chooses Triton kernels by trying whether they are exact on the device, and takes a rounded tensor over from where it was made."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from compress.layers.kernels import available, failures
from compress.layers.scheme import Numbers

if TYPE_CHECKING:
    from compress.layers.kernels.rows import Rounded

CARRIED = "_compress_rounded"
"""Attribute of a tensor in which it carries its own values rounded per token, from the kernel that made it to the layer that
multiplies it. The attribute belongs to this tensor object: a view or a copy carries nothing, and its values are rounded again."""
MAKER = "_compress_maker"
"""Attribute of a tensor that names the layer that made it, which may round it in the same pass the next time."""


@functools.cache
def row_kernels(device_type: str) -> Any:
    """Return the module of the row kernels, or None where Triton is absent or does not round exactly on this type of device."""
    if not available(device_type):
        return None
    from compress.layers.kernels import rows

    # Ties, both ends, a subnormal of E4M3 and a row of zeros. Scales are powers of two, so that no division rounds.
    x = torch.zeros(3, 24, device=device_type)
    x[0, :6] = torch.tensor([127.0, -127.0, 0.5, 1.5, -2.5, 3.0])
    x[1, :6] = torch.tensor([448.0, -448.0, 17.0, 19.0, 0.0009765625, 248.0])
    integers = torch.tensor([127, -127, 0, 2, -2, 3])
    floats = torch.tensor([448.0, -448.0, 16.0, 20.0, 0.0, 256.0])
    try:
        first, second = rows.quantize(x, Numbers.INTEGER), rows.quantize(x, Numbers.FLOAT8)
    except failures():
        return None
    exact = torch.equal(first.values[0, :6].cpu().long(), integers) and torch.equal(second.values[1, :6].cpu().float(), floats)
    zeros = not first.values[2].any() and not second.values[2].float().any()
    return rows if exact and zeros else None


@functools.cache
def weight_kernels(device_type: str) -> Any:
    """Return the module of the kernels for packed weights, or None where they do not decode exactly on this type of device."""
    if not available(device_type):
        return None
    from compress.layers.kernels import weights

    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (8, 64), dtype=torch.uint8, generator=generator)
    scale = torch.rand((8, 2), generator=generator).half()
    u = torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1).float()
    expected = ((u - 8).view(8, 2, 64) * scale.float()[:, :, None]).flatten(1)
    packed = weights.PackedWeight(stored.to(device_type), scale.to(device_type), None, 4, 128, 64)
    try:
        values = weights.unpacked(packed, torch.float32).cpu()
        products = weights.few_token_product(torch.eye(16, 128, device=device_type), packed).cpu()
    except failures():
        return None
    return weights if torch.equal(values, expected) and torch.equal(products, expected[:, :16].t()) else None


def changes_of(x: torch.Tensor) -> int | None:
    """Return how often a tensor was changed in place; None for tensors of inference mode, which do not count it."""
    return None if x.is_inference() else x._version


def carry(x: torch.Tensor, rounded: Rounded) -> None:
    """Let a tensor carry its values rounded per token, until it is changed in place."""
    setattr(x, CARRIED, (rounded, changes_of(x)))


def rounded_input(x: torch.Tensor, numbers: Numbers, kernels: Any) -> Rounded:
    """Return the rows of `x` [..., width] rounded per token: what the tensor carries, or rounded now.

    A tensor that a fused norm made carries them from then on, and its norm is asked to round in its own pass the next time.
    """
    carried: tuple[Rounded, int | None] | None = getattr(x, CARRIED, None)
    if carried is not None and carried[0].numbers is numbers and carried[1] == changes_of(x):
        return carried[0]
    rounded: Rounded = kernels.quantize(x, numbers)
    maker = None if torch.compiler.is_compiling() else getattr(x, MAKER, None)
    if maker is not None:
        carry(x, rounded)
        maker.asked = numbers
    return rounded
