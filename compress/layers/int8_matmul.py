"""Kernels for products of int8 activations with int8 weights. The kernel of a device is chosen once, by testing which are exact.

All kernels compute the same integers, `sum_k x[t, k] * w[n, k]`, exact in 32 bits for inner sizes up to 2^31 / 127^2 = 133,000, and
scale them to floating point. They differ in the operator that they call and in the weight layout that it needs.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from compress.layers.kernels import available, failures


def pad_rows(x: torch.Tensor) -> torch.Tensor:
    """Pad `x` [rows, width] with zero rows to a multiple of 16, above 128 rows of 64; the caller removes them from the product.

    oneDNN compiles and caches a kernel for every new number of rows (about 60 KB and a millisecond each), and batches by token
    budget have a new number nearly every time.
    """
    step = 16 if x.shape[0] <= 128 else 64
    missing = -x.shape[0] % step
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


class Int8Matmul(Protocol):
    """A packed int8 weight [out, in] with its float32 scale [out], ready to multiply."""

    name: str

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None: ...

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply int8 [tokens, in], giving [tokens, out] in `dtype`, scaled by the weight's scale but not by the activation's."""
        ...

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Multiply int8 [tokens, in], scaled by the weight's scale and by the activations', float32 [tokens, 1] or one value.

        `bias` [out] is added in float32, and the result is rounded to `dtype` once.
        """
        ...


class Separately:
    """`Int8Matmul.scaled` as operators of their own, for kernels whose product does not apply the activations' scale."""

    def scaled(self, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Multiply, scale and add; see `Int8Matmul.scaled`."""
        y: torch.Tensor = self(x, torch.float32).mul_(scale)  # type: ignore[operator]
        if bias is not None:
            y = y.add_(bias)
        return y.to(dtype)


class OneDnnMatmul(Separately):
    """oneDNN's int8 linear operator on the CPU; it applies the scale of each output channel to the 32-bit sums.

    The fast path is unsigned x signed; signed x signed falls back to a reference loop in the tested build (torch 2.13). So
    activations are shifted by 128, and the operator subtracts that zero point exactly.
    """

    name = "onednn"
    ZERO_POINT = 128

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self._scale = scale.contiguous()
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int32)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply; see `Int8Matmul`."""
        shifted = pad_rows(x).view(torch.uint8).bitwise_xor(0x80)  # two's complement: flipping the sign bit adds 128
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, self.ZERO_POINT, self._weight, self._scale, self._zeros, None, 1.0, 0, dtype, "none", [], ""
        )
        return product[: x.shape[0]]


class OneDnnSplitMatmul(Separately):
    """oneDNN's int8 linear operator on CPUs without VNNI, as two products that cannot saturate.

    AVX2 adds pairs of unsigned x signed 8-bit products in 16 bits: 2 x 255 x 127 overflows them, 2 x 127 x 127 does not. So the
    shifted activation is split into its upper seven bits and its lowest bit.
    """

    name = "onednn_split"
    ZERO_POINT = 64  # zero point of the upper bits: half of 128

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._weight = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
        self._scale = scale.contiguous()
        self._ones = torch.ones(weight.shape[0])
        self._zeros = torch.zeros(weight.shape[0], dtype=torch.int32)

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply; see `Int8Matmul`."""
        shifted = pad_rows(x).view(torch.uint8).bitwise_xor(0x80)
        sums = self._product(shifted.bitwise_right_shift(1), self.ZERO_POINT).mul_(2)
        # Scale after adding, so that exact integers are added, not rounded multiples of them.
        sums = sums.add_(self._product(shifted.bitwise_and(1), 0)).mul_(self._scale)
        return sums[: x.shape[0]].to(dtype)

    def _product(self, x: torch.Tensor, zero_point: int) -> torch.Tensor:
        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, zero_point, self._weight, self._ones, self._zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


class IntMmMatmul(Separately):
    """`torch._int_mm`: cuBLASLt on CUDA, a plain loop or oneDNN on the CPU.

    It needs more than 16 rows, and inner and outer sizes that are multiples of 8, so both operands are padded with zeros, which
    adds nothing to the sums.
    """

    name = "int_mm"
    MIN_ROWS = 17
    MULTIPLE = 8

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor) -> None:
        self._outputs, inputs = weight.shape
        self._padding = -inputs % self.MULTIPLE
        padded = torch.nn.functional.pad(weight, (0, self._padding, 0, -self._outputs % self.MULTIPLE))
        # [in, out] as a view of a contiguous [out, in]: the column-major operand that cuBLASLt needs.
        self._weight = padded.contiguous().t()
        self._scale = scale.contiguous()

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply; see `Int8Matmul`."""
        rows = x.shape[0]
        missing = max(0, self.MIN_ROWS - rows)
        if missing or self._padding:
            x = torch.nn.functional.pad(x, (0, self._padding, 0, missing))
        sums = torch._int_mm(x, self._weight)[:rows, : self._outputs]
        return (sums * self._scale).to(dtype)


def is_exact(kernel: type[Int8Matmul], device: torch.device) -> bool:
    """Whether `kernel` runs on this device and returns exact integers at the ends of the range.

    CPUs without VNNI add pairs of 8-bit products in 16 bits, which saturates silently; so all values of the test are at the limits.
    """
    x = torch.tensor([[127] * 64, [-128] * 64, [127, -128] * 32], dtype=torch.int8, device=device)
    weight = torch.tensor([[127] * 64, [-127] * 64, [127, -127] * 32] * 8, dtype=torch.int8, device=device)
    expected = x.cpu().long() @ weight.cpu().long().t()
    try:
        product = kernel(weight, torch.ones(weight.shape[0], device=device))(x, torch.float32)
    except failures():  # the operator is not in this build, or not for this device
        return False
    return torch.equal(product.cpu().long(), expected)


@functools.cache
def int8_matmul(device_type: str) -> type[Int8Matmul]:
    """Return the fastest exact kernel for a type of device.

    Raises:
        RuntimeError: no kernel is exact; there is no silent fallback to floating point.
    """
    kernels: list[type[Int8Matmul]] = [OneDnnMatmul, OneDnnSplitMatmul, IntMmMatmul] if device_type == "cpu" else [IntMmMatmul]
    if available(device_type):
        from compress.layers.kernels.products import TritonMatmul

        kernels.insert(0, TritonMatmul)
    for kernel in kernels:
        if is_exact(kernel, torch.device(device_type)):
            return kernel
    names = ", ".join(kernel.name for kernel in kernels)
    raise RuntimeError(f"no exact int8 matrix product on {device_type!r} with torch {torch.__version__} (tried {names})")
