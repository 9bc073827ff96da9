"""A linear layer with weights in four-bit floating point, MXFP4 or NVFP4; its activations stay in floating point."""

from __future__ import annotations

import torch
from torch import nn

from compress.layers.compressed import CompressedLinear
from compress.layers.float4 import E4M3, Float4Grid, decoded_scale, unpacked
from compress.layers.float_layers import OneDnnLinear, has_onednn_linear, linear
from compress.layers.grid import in_groups, row_chunks
from compress.layers.packing import packed_width
from compress.layers.scheme import FLOAT4_GROUPS, ActivationScheme, Numbers, QuantizedLayer
from compress.layers.torch_packing import pack, unpack


class Float4Linear(CompressedLinear):
    """`y = x W^T + b` with W in E2M1 with a scale for each group of inputs, and x in floating point.

    The weight is unpacked and scaled in float32 and multiplied in the compute dtype, on every device: it is smaller, not faster.

    Buffers:
        `weight`: E2M1, two in a byte, the first in the lower half: uint8 [out, ceil(in / 2)].
        `weight_scale`: MXFP4: E8M0, the exponents of powers of two, uint8 [out, groups]. NVFP4: E4M3 [out, groups].
        `weight_global_scale`: NVFP4: what the scales were multiplied by, float32 []. MXFP4: None.
        `bias`: [out] or None.

    After `unpack` the layer can no longer be saved.
    """

    weight: torch.Tensor | None
    weight_scale: torch.Tensor
    weight_global_scale: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        layer: QuantizedLayer,
        in_features: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        whole: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> None:
        """Take the buffers; see the class.

        Raises:
            ValueError: bits, group size, zeros or activations are not the format's; the weight's width is not that of the inputs;
                the scales' dtype is not the format's, or the scale of the whole weight is missing or one too many.
        """
        super().__init__()
        if layer != float4_layer(layer.numbers):
            raise ValueError(f"{layer.numbers} weights have other bits, groups, zeros or activations than {layer!r}")
        if weight.dtype != torch.uint8 or weight.shape[1] != packed_width(in_features, 4):
            raise ValueError(f"{layer.numbers} weights of {in_features} inputs do not take {weight.dtype} {list(weight.shape)}")
        nvfp4 = layer.numbers is Numbers.NVFP4
        if scale.dtype != (E4M3 if nvfp4 else torch.uint8) or (whole is not None) != nvfp4:
            extra = "without" if whole is None else "with"
            raise ValueError(f"{layer.numbers} has no scales in {scale.dtype} {extra} one for the whole weight")
        self.layer = layer
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_global_scale", whole)
        self.register_buffer("bias", bias)
        self._values: torch.Tensor | None = None

    @classmethod
    def from_codes(cls, codes: torch.Tensor, grid: Float4Grid, bias: torch.Tensor | None) -> Float4Linear:
        """Take the bits of a grid, uint8 [out, in]."""
        bias = None if bias is None else bias.detach().clone()
        return cls(float4_layer(grid.numbers), codes.shape[1], pack(codes, 4), grid.stored, grid.whole, bias)

    @classmethod
    def empty(cls, linear: nn.Linear, layer: QuantizedLayer) -> Float4Linear:
        """Return a layer in place of `linear` whose buffers are on the meta device."""
        outputs, inputs = linear.out_features, linear.in_features
        nvfp4 = layer.numbers is Numbers.NVFP4
        with torch.device("meta"):
            weight = torch.empty((outputs, packed_width(inputs, 4)), dtype=torch.uint8)
            scale = torch.empty((outputs, -(-inputs // FLOAT4_GROUPS[layer.numbers])), dtype=E4M3 if nvfp4 else torch.uint8)
            whole = torch.empty(()) if nvfp4 else None
        return cls(layer, inputs, weight, scale, whole, linear.bias)

    def codes(self) -> torch.Tensor:
        """Return the weight's bits in E2M1, uint8 [out, in]."""
        return unpack(self._packed(), 4, self.in_features)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that is stored, [out, in]; the arithmetic is in float32."""
        packed, scale = self._packed(), decoded_scale(self.weight_scale, self.weight_global_scale)
        values = torch.empty((self.out_features, self.in_features), dtype=dtype, device=packed.device)
        for rows in row_chunks(values):
            grouped = in_groups(unpacked(packed[rows])[:, : self.in_features], FLOAT4_GROUPS[self.layer.numbers])
            values[rows] = (grouped * scale[rows, :, None]).flatten(1)[:, : self.in_features].to(dtype)
        return values

    def values(self) -> torch.Tensor:
        """Return the weight, float32 [out, in]."""
        return self.dequantized()

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the values."""
        return self.out_features * self.in_features * dtype.itemsize

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> None:
        """Keep the values in `dtype` and drop the packed ones; a second call does nothing. Results stay the same, bit for bit."""
        if self._values is None:
            self._values = self.dequantized(dtype)
            self.weight = None

    def held(self, dtype: torch.dtype) -> nn.Module:
        """Return a plain layer with the values."""
        plain = self.plain().to(dtype).requires_grad_(False)
        return OneDnnLinear(plain, dtype) if plain.weight.device.type == "cpu" and has_onednn_linear(dtype) else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return linear(x, self.dequantized(x.dtype) if self._values is None else self._values, bias)

    def _packed(self) -> torch.Tensor:
        assert self.weight is not None, "an unpacked layer has no packed weight"
        return self.weight

    def extra_repr(self) -> str:
        """Show sizes and format in the printed model."""
        return f"in={self.in_features}, out={self.out_features}, {self.layer.name}"


def float4_layer(numbers: Numbers) -> QuantizedLayer:
    """Return how a layer in a format of four-bit floating point is stored.

    Raises:
        KeyError: it is no such format.
    """
    return QuantizedLayer(numbers=numbers, bits=4, group_size=FLOAT4_GROUPS[numbers], activations=ActivationScheme.NONE)
