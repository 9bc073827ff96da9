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


# Ties, both ends and a subnormal of E4M3, and what they round to. Scales are one, so that no division rounds.
_TRIALS = {
    Numbers.INTEGER: ([127.0, -127.0, 0.5, 1.5, -2.5, 3.0], [127.0, -127.0, 0.0, 2.0, -2.0, 3.0]),
    Numbers.FLOAT8: ([448.0, -448.0, 17.0, 19.0, 0.0009765625, 248.0], [448.0, -448.0, 16.0, 20.0, 0.0, 256.0]),
}


@functools.cache
def row_kernels(device_type: str, numbers: Numbers = Numbers.INTEGER) -> Any:
    """Return the module of the row kernels, or None where Triton is absent or does not round exactly on this type of device.

    `numbers`: what rows are to be rounded to. A card may lack one of both: those before compute capability 8.9 have no E4M3.
    """
    if not available(device_type):
        return None
    from compress.layers.kernels import rows

    values, expected = _TRIALS[numbers]
    x = torch.zeros(2, 24, device=device_type)
    x[0, :6] = torch.tensor(values)
    try:
        rounded = rows.quantize(x, numbers).values.float().cpu()
    except failures():
        return None
    return rows if torch.equal(rounded[0, :6], torch.tensor(expected)) and not rounded[1].any() else None


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
