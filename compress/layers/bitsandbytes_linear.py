"""Linear layers stored and multiplied by the bitsandbytes package: LLM.int8(), NF4 and FP4."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from compress.common.errors import UserError
from compress.layers.compressed import CompressedLinear
from compress.layers.scheme import BLOCK, NESTED_BLOCK, Numbers, QuantizedLayer

OUTLIER = 6.0
"""Input channels with a magnitude above this are multiplied in floating point (LLM.int8(), arXiv 2208.07339, section 3.2)."""


@cache
def bitsandbytes() -> Any:
    """Import the package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError("the package bitsandbytes is not installed", "pip install 'compress-embedders[bitsandbytes]'") from error
    # It warns at every layer that float32 inputs are cast, and once that a kernel from the hub is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return bitsandbytes


class BitsAndBytes4BitLinear(CompressedLinear):
    """NF4 or FP4 weights in blocks of 64, with 8-bit scales in blocks of 256 (QLoRA, arXiv 2305.14314, section 3).

    Buffers: `weight` uint8 [ceil(out x in / 2), 1] in the package's own layout, `weight_scale` uint8 [blocks],
    `weight_nested_scale` float32 [ceil(blocks / 256)] and `weight_nested_offset` float32 [], `bias` [out] or None.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_nested_scale: torch.Tensor
    weight_nested_offset: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: QuantizedLayer,
        shape: tuple[int, int],
        weight: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
    ) -> None:
        """Take the buffers; `shape`: outputs and inputs."""
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = shape
        self.register_buffer("weight", weight)
        for name, tensor in zip(("weight_scale", "weight_nested_scale", "weight_nested_offset"), scales, strict=True):
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)
        self._state: Any = None

    @classmethod
    def from_float(cls, linear: nn.Linear, numbers: Numbers) -> BitsAndBytes4BitLinear:
        """Quantize `linear`."""
        functional = bitsandbytes().functional
        stored, state = functional.quantize_4bit(
            linear.weight.detach().float(), blocksize=BLOCK, quant_type=str(numbers), compress_statistics=True
        )
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = QuantizedLayer(numbers=numbers, bits=4, group_size=BLOCK)
        scales = (state.absmax, state.state2.absmax, state.offset.float())
        return cls(layer, (linear.out_features, linear.in_features), stored, scales, bias)

    @classmethod
    def empty(cls, linear: nn.Linear, layer: QuantizedLayer) -> BitsAndBytes4BitLinear:
        """Return a layer in place of `linear` whose buffers are on the meta device."""
        count = linear.out_features * linear.in_features
        blocks = -(-count // BLOCK)
        with torch.device("meta"):
            scales = (torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // NESTED_BLOCK)), torch.empty(()))
            weight = torch.empty((-(-count // 2), 1), dtype=torch.uint8)
        return cls(layer, (linear.out_features, linear.in_features), weight, scales, linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: torch.Tensor = bitsandbytes().matmul_4bit(x, self.weight.t(), self._quant_state(), bias=bias)
        return y

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that is stored, [out, in]."""
        values: torch.Tensor = bitsandbytes().functional.dequantize_4bit(self.weight, self._quant_state())
        return values.to(dtype)

    def values(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]."""
        return self.dequantized()

    def _quant_state(self) -> Any:
        """Return the package's description of the weight, made once the buffers are on their final device."""
        if self._state is None or self._state.absmax.device != self.weight.device:
            functional, device = bitsandbytes().functional, self.weight.device
            nested = functional.QuantState(
                absmax=self.weight_nested_scale,
                blocksize=NESTED_BLOCK,
                code=functional.create_dynamic_map().to(device),
                dtype=torch.float32,
            )
            self._state = functional.QuantState(
                absmax=self.weight_scale,
                shape=torch.Size((self.out_features, self.in_features)),
                code=functional.get_4bit_type(str(self.layer.numbers), device=device),
                blocksize=BLOCK,
                quant_type=str(self.layer.numbers),
                dtype=torch.float32,
                offset=self.weight_nested_offset,
                state2=nested,
            )
        return self._state


class BitsAndBytesInt8Linear(CompressedLinear):
    """LLM.int8(): int8 weights and activations; input channels with outliers stay in floating point (arXiv 2208.07339).

    Buffers: `weight` int8 [out, in], `weight_scale` float32 [out] (each row's largest magnitude), `bias` [out] or None.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: QuantizedLayer, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take the buffers."""
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def from_float(cls, linear: nn.Linear, layer: QuantizedLayer) -> BitsAndBytesInt8Linear:
        """Quantize `linear`; the package quantizes from half precision."""
        weight, scale, _ = bitsandbytes().functional.int8_vectorwise_quant(linear.weight.detach().half())
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(layer, weight, scale, bias)

    @classmethod
    def empty(cls, linear: nn.Linear, layer: QuantizedLayer) -> BitsAndBytesInt8Linear:
        """Return a layer in place of `linear` whose buffers are on the meta device."""
        weight = torch.empty((linear.out_features, linear.in_features), dtype=torch.int8, device="meta")
        return cls(layer, weight, torch.empty(linear.out_features, device="meta"), linear.bias)

    def values(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]; 127 stands for the largest magnitude of a row."""
        return self.weight.float().mul_(self.weight_scale[:, None] / 127)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        package = bitsandbytes()
        state = package.MatmulLtState()
        state.CB, state.SCB, state.threshold, state.has_fp16_weights = self.weight, self.weight_scale, OUTLIER, False
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y: torch.Tensor = package.matmul(x, self.weight, state=state, bias=bias)
        return y.to(x.dtype)
