"""A linear layer with FP8 weights; its activations stay in floating point or are rounded to FP8, token by token."""

from __future__ import annotations

import functools

import torch
from torch import nn

from compress.layers.compressed import CompressedLinear
from compress.layers.float_layers import linear as plain_linear
from compress.layers.grid import SMALLEST_SCALE
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer

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
        rows = x.reshape(-1, self.in_features)
        if self.layer.activations is ActivationScheme.NONE:
            y = plain_linear(rows, self.weight.to(x.dtype)).float()
        else:
            quantized, scale = to_float8(rows)
            if has_float8_products(x.device) and x.dtype in (torch.float16, torch.bfloat16):
                ones = torch.ones((1, self.out_features), device=x.device)
                y = torch._scaled_mm(quantized, self.weight.t(), scale, ones, out_dtype=torch.bfloat16).float()
            else:
                y = plain_linear(quantized.to(x.dtype), self.weight.to(x.dtype)).float().mul_(scale)
        y = y.mul_(self.weight_scale)
        if self.bias is not None:
            y = y.add_(self.bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


@functools.cache
def has_float8_products(device: torch.device) -> bool:
    """Whether the device multiplies FP8 numbers directly."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
