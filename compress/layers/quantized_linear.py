"""A linear layer on int8 weights, with its activations quantized as its scheme says."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.int8_matmul import Int8Matmul, int8_matmul
from compress.layers.scheme import ActivationScheme

QMAX = 127  # symmetric: -128 is not used, so that negating a value never overflows
# Of an all-zero row: any positive scale gives zeros. Small, and still a normal number in half precision.
SMALLEST_SCALE = 1e-7


def quantize_symmetric(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x / scale` to the nearest int8 in [-127, 127]; `scale` broadcasts against `x`."""
    # In float32 whatever x is: bfloat16 cannot hold the integers between 128 and 256 that rounding may pass through.
    return (x.float() / scale).round_().clamp_(-QMAX, QMAX).to(torch.int8)


def weight_scale(weight: torch.Tensor) -> torch.Tensor:
    """Return the symmetric scale of each output channel of `weight` [out, in]: absmax / 127, float32 [out]."""
    return weight.float().abs().amax(dim=1).div_(QMAX).clamp_min_(SMALLEST_SCALE)


class QuantizedLinear(nn.Module):
    """`y = x W^T + b` with W in int8 (one float32 scale per output channel) and x quantized by `scheme`.

    Buffers: `weight` int8 [out, in], `weight_scale` float32 [out], `bias` [out] or None, and `input_scale` float32 [] for the
    static scheme. Once `pack`ed, the weight lives in the kernel's own layout alone and the layer can no longer be saved.
    """

    weight: torch.Tensor | None
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        scheme: ActivationScheme,
        input_scale: torch.Tensor | None = None,
    ) -> None:
        """Take int8 `weight` [out, in], float32 `scale` [out], `bias` [out] and, for the static scheme, `input_scale` [].

        Raises:
            ValueError: the weight is not int8, or an input scale is missing for the static scheme or given for another.
        """
        super().__init__()
        if weight.dtype != torch.int8:
            raise ValueError(f"QuantizedLinear takes int8 weights, got {weight.dtype}")
        if (input_scale is not None) != (scheme is ActivationScheme.STATIC_PER_TENSOR):
            raise ValueError(f"an input scale goes with the static scheme and with no other; the scheme is {scheme}")
        self.out_features, self.in_features = weight.shape
        self.scheme = scheme
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self._packed: Int8Matmul | None = None

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: ActivationScheme) -> QuantizedLinear:
        """Round `linear` to the nearest int8, one scale per output channel."""
        scale = weight_scale(linear.weight.detach())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(quantize_symmetric(linear.weight.detach(), scale[:, None]), scale, bias, scheme)

    def pack(self) -> None:
        """Hand the weight over to the kernel of its device and drop the plain copy; a second call does nothing."""
        if self.weight is not None and self.scheme is not ActivationScheme.NONE:
            self._packed = int8_matmul(self.weight.device.type)(self.weight, self.weight_scale)
            self.weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.scheme is ActivationScheme.NONE:
            assert self.weight is not None  # never packed under this scheme
            weight = self.weight.to(x.dtype) * self.weight_scale.to(x.dtype)[:, None]
            return nn.functional.linear(x, weight, bias)
        rows = x.reshape(-1, self.in_features)
        input_scale = self._input_scale(rows)
        quantized = quantize_symmetric(rows, input_scale)
        # Not cached before `pack`: an unpacked layer may still be changed or saved.
        matmul = self._packed or int8_matmul(x.device.type)(self._plain_weight(), self.weight_scale)
        y = matmul(quantized, torch.float32).mul_(input_scale)
        if bias is not None:
            y = y.add_(bias)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _plain_weight(self) -> torch.Tensor:
        assert self.weight is not None
        return self.weight

    def _input_scale(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the scale of the activations, float32, [tokens, 1] per token and [] or [1, 1] per tensor."""
        if self.scheme is ActivationScheme.STATIC_PER_TENSOR:
            assert self.input_scale is not None
            return self.input_scale
        if rows.shape[0] == 0:
            return rows.new_ones((0, 1), dtype=torch.float32)
        largest = rows.abs().amax(dim=1, keepdim=True)
        if self.scheme is ActivationScheme.DYNAMIC_PER_TENSOR:
            largest = largest.amax(dim=0, keepdim=True)
        return largest.float().div_(QMAX).clamp_min_(SMALLEST_SCALE)

    def extra_repr(self) -> str:
        """Show sizes and scheme in the printed model."""
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, activations={self.scheme}"
