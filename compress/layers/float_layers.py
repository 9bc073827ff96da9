"""Floating-point layers of the torch runtime: the same numbers, stored or multiplied in another way."""

from __future__ import annotations

import functools

import torch
from torch import nn


class OneDnnLinear(nn.Module):
    """A float32 or bfloat16 linear layer through oneDNN, with its weight packed once.

    `nn.Linear` in float32 uses MKL, which runs at less than half of oneDNN's rate on CPUs that are not Intel's (2.2x measured on a
    2,048 x 384 x 1,536 product, AMD EPYC Zen 5, torch 2.13). A baseline through MKL would make every variant look faster.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), None)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of the weight."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], "")
        return y


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x weight^T + bias`, [..., in] and [out, in] to [..., out], by oneDNN where `OneDnnLinear` would use it."""
    if x.device.type == "cpu" and has_onednn_linear(x.dtype):
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
        return y
    return nn.functional.linear(x, weight, bias)


class CastEmbedding(nn.Module):
    """A lookup table in its stored dtype; rows are cast after the lookup, so half-precision tables take half the memory."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(embedding.weight.detach(), requires_grad=False)
        self._dtype = dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [...] to [..., width] in the compute dtype."""
        return nn.functional.embedding(ids, self.weight).to(self._dtype)


@functools.cache
def has_onednn_linear(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's packed linear layer, and this CPU multiplies `dtype` with it.

    float16 is left to torch: oneDNN supports it only on the newest CPUs.
    """
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype is torch.float32
