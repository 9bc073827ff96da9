"""A linear layer with FP8 weights; its activations stay in floating point or are rounded to FP8, token by token."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress.layers.compressed import CompressedLinear
from compress.layers.float_layers import linear as plain_linear
from compress.layers.grid import SMALLEST_SCALE
from compress.layers.kernels.choice import rounded_input, row_kernels
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer

if TYPE_CHECKING:
    from compress.layers.kernels.rows import Rounded

E4M3 = torch.float8_e4m3fn
LARGEST = float(torch.finfo(E4M3).max)


def to_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale each row's largest magnitude to 448, E4M3's largest value, and round: E4M3 [rows, n] and float32 scales [rows, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True).float().div_(LARGEST).clamp_min_(SMALLEST_SCALE)
    # Clamp first: E4M3 has no infinity, and casting a larger value gives NaN.
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


class Float8Linear(CompressedLinear):
    """`y = x W^T + b` with W in E4M3, one float32 scale per output channel, and x in floating point or E4M3 per token.

    E4M3: Micikevicius et al. 2022, arXiv 2209.05433. Buffers: `weight` E4M3 [out, in], `weight_scale` float32 [out], `bias` [out]
    or None. GPUs of compute capability 8.9 and later multiply FP8 directly; elsewhere the same rounded numbers are multiplied in
    the compute dtype, which represents each of them exactly.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: QuantizedLayer, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take the buffers.

        Raises:
            ValueError: the weight is not E4M3, or the scheme is neither `none` nor `dynamic_per_token`.
        """
        super().__init__()
        if weight.dtype != E4M3:
            raise ValueError(f"Float8Linear takes {E4M3} weights, got {weight.dtype}")
        if layer.activations not in (ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_TOKEN):
            raise ValueError(f"FP8 activations are scaled per token, not {layer.activations}")
        self.layer = layer
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: ActivationScheme) -> Float8Linear:
        """Round `linear` to the nearest E4M3 values, one scale per output channel."""
        weight, scale = to_float8(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(QuantizedLayer(numbers=Numbers.FLOAT8, bits=8, activations=scheme), weight, scale[:, 0].contiguous(), bias)

    @classmethod
    def empty(cls, linear: nn.Linear, layer: QuantizedLayer) -> Float8Linear:
        """Return a layer in place of `linear` whose buffers are on the meta device."""
        weight = torch.empty((linear.out_features, linear.in_features), dtype=E4M3, device="meta")
        return cls(layer, weight, torch.empty(linear.out_features, device="meta"), linear.bias)

    def values(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]."""
        return self.weight.float().mul_(self.weight_scale[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        kernels = row_kernels(x.device.type, Numbers.FLOAT8) if self.takes is not None else None
        if kernels is not None and self.in_features <= kernels.WIDEST:
            return self.multiply(rounded_input(x, Numbers.FLOAT8, kernels), x.dtype).view(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        if self.layer.activations is ActivationScheme.NONE:
            y = plain_linear(rows, self.weight.to(x.dtype)).float().mul_(self.weight_scale)
            if self.bias is not None:
                y = y.add_(self.bias)
            return y.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return self._product(*to_float8(rows), x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def takes(self) -> Numbers | None:
        """The numbers that its input may come rounded to, per token; None where it stays in floating point."""
        return None if self.layer.activations is ActivationScheme.NONE else Numbers.FLOAT8

    def multiply(self, rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """Multiply an input that was rounded as `takes` says: [rows, in] to [rows, out] in `dtype`."""
        return self._product(rounded.values, rounded.scale, dtype)

    def _product(self, quantized: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Multiply E4M3 [rows, in] with its scales, float32 [rows, 1], to [rows, out] in `dtype`."""
        whole = self.in_features % 16 == 0 and self.out_features % 16 == 0
        made = product_dtype(quantized.device, dtype) if whole and len(quantized) else None
        if made is not None:
            y = float8_product(quantized, self.weight, scale, self.weight_scale, made)
            if self.bias is not None:
                y = y.add_(self.bias)
            return y.to(dtype)
        y = plain_linear(quantized.to(dtype), self.weight.to(dtype)).float().mul_(scale).mul_(self.weight_scale)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.to(dtype)


def float8_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Return `(x weight^T) * x_scale * weight_scale` in `dtype`, in one product with fast accumulation.

    Args:
        x: E4M3 [rows, inputs]; sizes other than `rows` are multiples of 16.
        weight: E4M3 [outputs, inputs], contiguous.
        x_scale: float32 [rows, 1].
        weight_scale: float32 [outputs].
        dtype: bfloat16, or float16 where the device has it; see `product_dtype`.
    """
    product: torch.Tensor = torch._scaled_mm(x, weight.t(), x_scale, weight_scale[None, :], out_dtype=dtype, use_fast_accum=True)
    return product


def product_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which a device's FP8 products serve a compute dtype; None: they do not.

    Results for float16 are bfloat16, with three bits less, where the device or this torch gives no others.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return None
    return next((made for made in (dtype, torch.bfloat16) if has_float8_products(device, made)), None)


@functools.cache
def has_float8_products(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether the device multiplies FP8 numbers directly, with a scale for each row and column, to `dtype`: found by trying.

    The products of small whole numbers are exact in half precision whatever the order of the sums.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return False
    row, column = torch.arange(32, device=device) % 3 - 1, torch.arange(16, device=device) % 2
    x, weight = (row[:, None] * column[None, :]).float(), torch.eye(16, device=device)
    scales = torch.full((32, 1), 2.0, device=device), torch.arange(1, 17, device=device).float()
    try:
        product = float8_product(x.to(E4M3), weight.to(E4M3), *scales, dtype)
    except (RuntimeError, ValueError):  # this build of torch has no product with scales by row for this card
        return False
    return torch.equal(product.float(), x * scales[0] * scales[1])
