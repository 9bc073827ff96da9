"""A linear layer with integer weights, whose activations are quantized by a scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from compress.layers.compressed import CompressedLinear
from compress.layers.float_layers import OneDnnLinear, has_onednn_linear, linear
from compress.layers.grid import SMALLEST_SCALE, Grid, dequantize, find_grid
from compress.layers.int8_matmul import Int8Matmul, int8_matmul
from compress.layers.kernels.choice import rounded_input, row_kernels, weight_kernels
from compress.layers.packing import packed_width
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.layers.torch_packing import pack, unpack

if TYPE_CHECKING:
    from compress.layers.kernels.rows import Rounded

QMAX = 127  # largest integer of a symmetric 8-bit grid


def quantize_symmetric(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Round `x / scale` to the nearest int8, ties to even, as ONNX's QuantizeLinear does; `scale` broadcasts against `x`.

    Values beyond a static scale saturate at -128 or 127: one below the grid's lowest value, because every runtime saturates there.
    """
    # In float32 whatever the dtype of x: bfloat16 does not represent every integer between 128 and 256.
    return (x.float() / scale).round_().clamp_(-QMAX - 1, QMAX).to(torch.int8)


def round_groups(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """Round each group of inputs of each token to int8 with a scale of its own, and return the values: [..., in] in x's dtype.

    The scale takes the group's largest magnitude to 127; ties go to even. In float32 these are the values that onnxruntime's
    `MatMulNBits` multiplies at accuracy level 4: it multiplies by the reciprocal of the scale, and so do we. The last group is
    smaller where the inputs are not a multiple of the group size.
    """
    inputs = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -inputs % group_size)).view(*x.shape[:-1], -(-inputs // group_size), group_size)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    reciprocal = (QMAX / largest).clamp_max_(torch.finfo(torch.float32).max)  # finite where a group is zero, and stays zero
    values: torch.Tensor = (groups * reciprocal).round_().mul_(largest / QMAX)
    return values.flatten(-2)[..., :inputs].to(x.dtype)


class QuantizedLinear(CompressedLinear):
    """`y = x W^T + b` with W in integers of 2 to 8 bits and x quantized by a scheme.

    Buffers:
        `weight`: int8 [out, in] for symmetric 8-bit weights, otherwise the unsigned integers of `compress.layers.grid` packed
            without gaps, uint8 [out, ceil(in x bits / 8)].
        `weight_scale`: float32 [out] with one scale per output channel, float16 [out, groups] with groups of inputs.
        `weight_zero`: packed in the same way, uint8 [out, ceil(groups x bits / 8)], for grids that are not symmetric.
        `bias`: [out] or None.
        `input_scale`: float32 [], for the static scheme.
        `input_factor`: float32 [in], where the input is first divided by it.

    After `pack`, the weight of a layer that multiplies integers exists only in the kernel's layout, and the layer can no longer be
    saved; nor can one after `unpack`.
    """

    weight: torch.Tensor | None
    weight_scale: torch.Tensor
    weight_zero: torch.Tensor | None
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None
    input_factor: torch.Tensor | None

    def __init__(
        self,
        layer: QuantizedLayer,
        in_features: int,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        zero: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        input_factor: torch.Tensor | None = None,
    ) -> None:
        """Take the buffers; see the class.

        Raises:
            ValueError: the dtype or shape of the weight does not match the layer's bits; a buffer that the scheme or the grid needs
                is missing, or one is given that it does not use; activations have one scale per token or tensor and the weight has
                groups or zeros, which no integer product allows; activations have one scale per group and the weight has none.
        """
        super().__init__()
        width, dtype = stored_weight(layer, in_features)
        if weight.dtype != dtype or weight.shape[1] != width:
            raise ValueError(
                f"{layer.name} weights of {in_features} inputs are {dtype} [out, {width}], got {weight.dtype} {list(weight.shape)}"
            )
        if (input_scale is not None) != (layer.activations is ActivationScheme.STATIC_PER_TENSOR):
            raise ValueError(f"an input scale belongs to the static scheme only; the scheme is {layer.activations}")
        if (zero is not None) == layer.symmetric:
            raise ValueError(f"zeros belong to grids that are not symmetric; symmetric is {layer.symmetric}")
        if (input_factor is not None) != layer.input_factor:
            raise ValueError(f"an input factor belongs to input_factor; it is {layer.input_factor}")
        if layer.activations is ActivationScheme.DYNAMIC_PER_GROUP and not layer.group_size:
            raise ValueError("activations with a scale per group need weights with a group size")
        self.layer = layer
        if self.multiplies_integers and (layer.group_size or not layer.symmetric):
            raise ValueError("quantized activations need symmetric weights with one scale per output channel")
        self.in_features, self.out_features = in_features, weight.shape[0]
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero", zero)
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", input_scale)
        self.register_buffer("input_factor", input_factor)
        self._packed: Int8Matmul | None = None
        self._stored_for_kernels: Any = None
        self._values: torch.Tensor | None = None

    @property
    def scheme(self) -> ActivationScheme:
        """How activations are quantized."""
        return self.layer.activations

    @property
    def multiplies_integers(self) -> bool:
        """Whether both operands of its product are integers; otherwise the values of rounded ones are multiplied."""
        return self.layer.activations not in (ActivationScheme.NONE, ActivationScheme.DYNAMIC_PER_GROUP)

    @classmethod
    def from_integers(
        cls,
        integers: torch.Tensor,
        grid: Grid,
        bias: torch.Tensor | None,
        scheme: ActivationScheme = ActivationScheme.NONE,
        *,
        input_scale: torch.Tensor | None = None,
        input_factor: torch.Tensor | None = None,
    ) -> QuantizedLinear:
        """Take the unsigned integers of a grid, uint8 [out, in]."""
        layer = QuantizedLayer(
            bits=grid.bits,
            group_size=grid.group_size,
            symmetric=grid.symmetric,
            activations=scheme,
            input_factor=input_factor is not None,
        )
        return cls(
            layer,
            integers.shape[1],
            *stored_grid(integers, grid),
            None if bias is None else bias.detach().clone(),
            zero=None if grid.symmetric else pack(grid.zero.to(torch.uint8), grid.bits),
            # Copies: layers with the same input are given the same tensors, and safetensors files hold no shared ones.
            input_scale=None if input_scale is None else input_scale.clone(),
            input_factor=None if input_factor is None else input_factor.clone(),
        )

    @classmethod
    def from_float(cls, linear: nn.Linear, scheme: ActivationScheme, bits: int = 8, **grid: object) -> QuantizedLinear:
        """Round `linear` to the grid that `find_grid` finds; by default int8 with one scale per output channel."""
        found = find_grid(linear.weight.detach(), bits, **grid)  # type: ignore[arg-type]
        return cls.from_integers(found.round(linear.weight.detach()), found, linear.bias, scheme)

    @classmethod
    def empty(cls, linear: nn.Linear, layer: QuantizedLayer) -> QuantizedLinear:
        """Return a layer in place of `linear` whose buffers are on the meta device."""
        width, dtype = stored_weight(layer, linear.in_features)
        with torch.device("meta"):
            weight = torch.empty((linear.out_features, width), dtype=dtype)
            scale = stored_scale(layer, linear.out_features, linear.in_features)
            zeros = packed_width(scale.view(linear.out_features, -1).shape[1], layer.bits)
            zero = None if layer.symmetric else torch.empty(linear.out_features, zeros, dtype=torch.uint8)
            static = layer.activations is ActivationScheme.STATIC_PER_TENSOR
            input_scale = torch.empty(()) if static else None
            factor = torch.empty(linear.in_features) if layer.input_factor else None
        return cls(layer, linear.in_features, weight, scale, linear.bias, zero=zero, input_scale=input_scale, input_factor=factor)

    def integers(self) -> torch.Tensor:
        """Return the weight's unsigned integers, uint8 [out, in]."""
        return stored_integers(self._stored(), self.layer, self.in_features)

    def zeros(self) -> torch.Tensor:
        """Return the zeros, uint8 [out, groups]."""
        return stored_zeros(self.weight_zero, self.layer, self.weight_scale)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the integers represent, [out, in], for an input divided by `input_factor`."""
        scale = self.weight_scale.view(self.out_features, -1)
        return dequantize(self.integers(), scale, self.zeros(), self.layer.group_size, dtype)

    def values(self) -> torch.Tensor:
        """Return the weight for an input that is not divided by `input_factor`, float32 [out, in]."""
        weight = self.dequantized()
        return weight if self.input_factor is None else weight.div_(self.input_factor)

    def pack(self) -> None:
        """Pack the weight for the kernel of its device and drop the plain copy; a second call does nothing."""
        if self.weight is None:
            return
        if self.multiplies_integers:
            self._packed = self._matmul()
            self.weight = None
        elif self._stored_for_kernels is None:
            self._stored_for_kernels = self._packed_weight()

    def unpacked_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the values, where the product is one of values."""
        return 0 if self.multiplies_integers else self.out_features * self.in_features * dtype.itemsize

    @torch.no_grad()
    def unpack(self, dtype: torch.dtype) -> None:
        """Keep the values in `dtype`, where the product is one of values; a second call does nothing.

        The stored weight is dropped where no kernel multiplies it as it is. Results stay the same, bit for bit.
        """
        if self.multiplies_integers or self._values is not None:
            return
        # As the calls unpack it: `OneDnnLinear` would pack it for a kernel that adds in another order.
        self._values = self.dequantized(dtype)
        if self._stored_for_kernels is None:
            self.weight = None

    def held(self, dtype: torch.dtype) -> nn.Module:
        """Return the packed layer itself; where only weights are quantized, a plain layer with their values."""
        if self.scheme is not ActivationScheme.NONE:
            self.pack()
            self.unpack(dtype)
            return self
        plain = self.plain().to(dtype).requires_grad_(False)
        return OneDnnLinear(plain, dtype) if plain.weight.device.type == "cpu" and has_onednn_linear(dtype) else plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not self.multiplies_integers:
            if self.input_factor is not None:
                x = x / self.input_factor.to(x.dtype)
            if self.scheme is ActivationScheme.DYNAMIC_PER_GROUP:
                assert self.layer.group_size is not None
                x = round_groups(x, self.layer.group_size)
            return self._values_product(x, bias)
        if self.takes is not None and (kernels := row_kernels(x.device.type)) is not None and self.in_features <= kernels.WIDEST:
            return self.multiply(rounded_input(x, self.takes, kernels), x.dtype).view(*x.shape[:-1], self.out_features)
        rows = x.reshape(-1, self.in_features)
        if self.input_factor is not None:
            rows = rows / self.input_factor
        input_scale = self._input_scale(rows)
        quantized = quantize_symmetric(rows, input_scale)
        # Not cached before `pack`: until then the layer may be changed or saved.
        matmul = self._packed or self._matmul()
        return matmul.scaled(quantized, input_scale, bias, x.dtype).view(*x.shape[:-1], self.out_features)

    @property
    def takes(self) -> Numbers | None:
        """The numbers that its input may come rounded to, per token; None where it rounds its own way."""
        dynamic = self.scheme is ActivationScheme.DYNAMIC_PER_TOKEN and self.input_factor is None
        return Numbers.INTEGER if dynamic else None

    def multiply(self, rounded: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """Multiply an input that was rounded as `takes` says: [rows, in] to [rows, out] in `dtype`."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return (self._packed or self._matmul()).scaled(rounded.values, rounded.scale, bias, dtype)

    def _values_product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Multiply a floating-point input: few tokens with the packed weight, where a kernel reads it, many with its values."""
        kernels = weight_kernels(x.device.type) if self.layer.bits in (4, 8) else None
        rows = x.reshape(-1, self.in_features)
        if kernels is not None and len(rows) <= kernels.FEW_TOKENS:
            few: torch.Tensor = kernels.few_token_product(rows, self._stored_for_kernels or self._packed_weight(), bias)
            return few.view(*x.shape[:-1], self.out_features)
        if self._values is not None:
            return linear(x, self._values, bias)
        if kernels is None:
            return linear(x, self.dequantized(x.dtype), bias)
        return linear(x, kernels.unpacked(self._stored_for_kernels or self._packed_weight(), x.dtype), bias)

    def _packed_weight(self) -> Any:
        """Return the weight as the kernels for packed weights take it; None where there are none."""
        stored = self._stored()
        kernels = weight_kernels(stored.device.type) if self.layer.bits in (4, 8) else None
        if kernels is None:
            return None
        return kernels.PackedWeight(
            values=stored.contiguous(),
            scale=self.weight_scale.view(self.out_features, -1).contiguous(),
            zero=None if self.weight_zero is None else self.zeros().contiguous(),
            bits=self.layer.bits,
            inputs=self.in_features,
            group_size=self.layer.group_size,
        )

    def _stored(self) -> torch.Tensor:
        assert self.weight is not None, "a packed layer has no plain weight"
        return self.weight

    def _matmul(self) -> Int8Matmul:
        stored = self._stored()
        if stored.dtype != torch.int8:
            stored = (self.integers().to(torch.int16) - 2 ** (self.layer.bits - 1)).to(torch.int8)
        return int8_matmul(stored.device.type)(stored, self.weight_scale)

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
        else:
            assert self.scheme is ActivationScheme.DYNAMIC_PER_TOKEN, self.scheme
        return largest.float().div_(QMAX).clamp_min_(SMALLEST_SCALE)

    def extra_repr(self) -> str:
        """Show sizes and scheme in the printed model."""
        return f"in={self.in_features}, out={self.out_features}, {self.layer.name}, activations={self.scheme}"


def stored_weight(layer: QuantizedLayer, inputs: int) -> tuple[int, torch.dtype]:
    """Return the width and the dtype of a stored integer weight: plain int8 for symmetric 8-bit weights, otherwise packed."""
    if layer.bits == 8 and layer.symmetric:
        return inputs, torch.int8
    return packed_width(inputs, layer.bits), torch.uint8


def stored_scale(layer: QuantizedLayer, outputs: int, inputs: int) -> torch.Tensor:
    """Return an empty tensor with the shape and dtype of stored scales: float32 [out], or float16 [out, groups]."""
    if layer.group_size is None:
        return torch.empty(outputs)
    return torch.empty(outputs, -(-inputs // layer.group_size), dtype=torch.float16)


def stored_grid(integers: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and scale in the form in which they are stored."""
    plain = grid.bits == 8 and grid.symmetric
    weight = integers.bitwise_xor(0x80).view(torch.int8) if plain else pack(integers, grid.bits)  # u - 128 in two's complement
    return weight, (grid.scale[:, 0].contiguous() if grid.group_size is None else grid.scale.half())


def stored_integers(weight: torch.Tensor, layer: QuantizedLayer, inputs: int) -> torch.Tensor:
    """Return the unsigned integers of a stored weight, uint8 [out, in]."""
    return weight.view(torch.uint8).bitwise_xor(0x80) if weight.dtype == torch.int8 else unpack(weight, layer.bits, inputs)


def stored_zeros(zero: torch.Tensor | None, layer: QuantizedLayer, scale: torch.Tensor) -> torch.Tensor:
    """Return the zeros of a stored weight, uint8 [out, groups]."""
    groups = scale.view(scale.shape[0], -1).shape[1]
    if zero is not None:
        return unpack(zero, layer.bits, groups)
    return torch.full((scale.shape[0], groups), 2 ** (layer.bits - 1), dtype=torch.uint8, device=scale.device)
