"""The operator that stands for a compressed layer while a network is traced, and what it becomes in each graph runtime.

The buffers keep their names and their bytes; what is written here is arithmetic around them. Weights [out, in] are transposed
by the graph, once, when a runtime loads it. Operators of the domain `com.microsoft` are onnxruntime's own
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx.defs import OpSchema
from onnxscript import values
from onnxscript.onnx_opset import opset21
from torch import nn

from compress.common.errors import UserError
from compress.common.lazy import attribute
from compress.layers.compressed import CompressedLayer
from compress.layers.grid import SMALLEST_SCALE
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QMAX, QuantizedLinear
from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.runtimes.contract import FLOAT32_LEVEL, GRAPH_RUNTIMES, INT8_LEVEL, runtime_named

op: Any = opset21  # its own annotations are for graphs written by hand, where every value has a declared type
# Of quantized activations as both runtimes hold them: unsigned, which VNNI multiplies with signed weights, shifted by this.
ACTIVATION_ZERO = 128


@torch.library.custom_op("compress::quantized_linear", mutates_args=())
def quantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    input_factor: torch.Tensor | None,
    layer: str,
) -> torch.Tensor:
    """Stand for a `QuantizedLinear`; see there for the buffers. `layer`: its `QuantizedLayer` as JSON."""
    raise NotImplementedError("it is traced, never run")


@quantized_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("compress::quantized_table", mutates_args=())
def quantized_table(
    ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, group: int, width: int
) -> torch.Tensor:
    """Stand for a `QuantizedEmbedding`."""
    raise NotImplementedError("it is traced, never run")


@quantized_table.register_fake
def _(ids: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int, group: int, width: int) -> torch.Tensor:
    return torch.empty((*ids.shape, width), dtype=torch.float32, device=ids.device)


class TracedLinear(nn.Module):
    """Takes a `QuantizedLinear`'s place and buffers, and calls the operator."""

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        self.layer, self.width = linear.layer, linear.in_features
        for name in ("weight", "weight_scale", "weight_zero", "bias", "input_scale", "input_factor"):
            self.register_buffer(name, getattr(linear, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return torch.ops.compress.quantized_linear(  # type: ignore[no-any-return]
            x, self.weight, self.weight_scale, self.weight_zero, self.bias, self.input_scale, self.input_factor,
            self.layer.model_dump_json(),
        )  # fmt: skip


class TracedTable(nn.Module):
    """Takes a `QuantizedEmbedding`'s place and buffers, and calls the operator."""

    def __init__(self, table: QuantizedEmbedding) -> None:
        super().__init__()
        self.layer, self.width = table.layer, table.embedding_dim
        self.register_buffer("weight", table.weight)
        self.register_buffer("weight_scale", table.weight_scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map int64 [...] to float32 [..., width]."""
        return torch.ops.compress.quantized_table(  # type: ignore[no-any-return]
            ids, self.weight, self.weight_scale, self.layer.bits, self.layer.group_size or 0, self.width
        )


def traced(layer: CompressedLayer) -> TracedLinear | TracedTable:
    """Return what takes a compressed layer's place while its network is traced."""
    if isinstance(layer, QuantizedEmbedding):
        return TracedTable(layer)
    assert isinstance(layer, QuantizedLinear), f"{type(layer).__name__} is lowered by no runtime"
    return TracedLinear(layer)


def translations(runtime: str) -> dict[Any, Callable[..., Any]]:
    """Return what the operators become in a runtime's graph, as `torch.onnx.export` takes it.

    Raises:
        UserError: the runtime is not known, or executes no graph.
    """
    place = runtime_named(runtime).linear
    if place is None:
        raise UserError(f"{runtime} executes no graph", f"these do: {', '.join(GRAPH_RUNTIMES)}")
    return {
        torch.ops.compress.quantized_linear.default: attribute(place),
        torch.ops.compress.quantized_table.default: _table,
    }


def openvino_linear(x: Any, weight: Any, scale: Any, zero: Any, bias: Any, input_scale: Any, factor: Any, layer: str) -> Any:
    """Quantize and dequantize around a floating-point product, which OpenVINO turns into an integer one."""
    inputs, x, stored = x.shape[-1], _divided(x, factor), QuantizedLayer.model_validate_json(layer)
    if stored.activations is ActivationScheme.STATIC_PER_TENSOR:
        middle = _constant(np.uint8(ACTIVATION_ZERO))
        x = op.DequantizeLinear(op.QuantizeLinear(x, input_scale, middle), input_scale, middle)
    elif stored.activations is not ActivationScheme.NONE:
        raise ValueError(f"OpenVINO's graph has no words for activations {stored.activations}")
    return _plus(op.MatMul(x, _dequantized(weight, scale, zero, stored, inputs)), bias)


def onnxruntime_linear(x: Any, weight: Any, scale: Any, zero: Any, bias: Any, input_scale: Any, factor: Any, layer: str) -> Any:
    """Multiply integers by the operator that onnxruntime's own quantizer fuses to, or four-bit weights by `MatMulNBits`."""
    inputs, x, stored = x.shape[-1], _divided(x, factor), QuantizedLayer.model_validate_json(layer)
    group = stored.group_size or 0
    if stored.activations is ActivationScheme.DYNAMIC_PER_GROUP:
        return _matmul_nbits(x, weight, scale, zero, bias, (group, INT8_LEVEL))
    if stored.activations is ActivationScheme.NONE:
        if stored.bits == 4 and group >= 16 and group & (group - 1) == 0 and inputs % group == 0:
            return _matmul_nbits(x, weight, scale, zero, bias, (group, FLOAT32_LEVEL))
        return _plus(op.MatMul(x, _dequantized(weight, scale, zero, stored, inputs)), bias)
    transposed, middle = op.Transpose(weight, perm=[1, 0]), _constant(np.uint8(ACTIVATION_ZERO))
    if stored.activations is ActivationScheme.DYNAMIC_PER_TOKEN:
        # Divided before the rounding and multiplied after the product: QuantizeLinear takes one scale for all tokens.
        step, one = _step(x, per_token=True), _constant(np.float32(1))
        rounded = op.QuantizeLinear(op.Div(x, step), one, middle)
        return _plus(op.Mul(MATMUL_INTEGER_TO_FLOAT(rounded, transposed, one, scale, middle, None, None), step), bias)
    if stored.activations is ActivationScheme.STATIC_PER_TENSOR:
        step = input_scale
    elif stored.activations is ActivationScheme.DYNAMIC_PER_TENSOR:
        step = _step(x, per_token=False)
    else:
        raise ValueError(f"onnxruntime's graph has no words for activations {stored.activations}")
    return MATMUL_INTEGER_TO_FLOAT(op.QuantizeLinear(x, step, middle), transposed, step, scale, middle, None, bias)


def _matmul_nbits(x: Any, weight: Any, scale: Any, zero: Any, bias: Any, how: tuple[int, int]) -> Any:
    """Multiply by four-bit weights in groups: our rows, their groups and their zeros lie in memory as that operator wants them.

    `how`: the size of the groups, and the operator's accuracy level. A last group that is smaller is filled up; the operator fills
    activations up with zeros.
    """
    inputs, outputs, (group, level) = x.shape[-1], weight.shape[0], how
    missing = -inputs % group
    if missing:
        weight = op.Pad(weight, _constant(np.array([0, 0, 0, missing // 2])))
    blocks = op.Reshape(weight, _constant(np.array([outputs, (inputs + missing) // group, group // 2])))
    flat = _constant(np.array([-1]))
    steps = op.Reshape(op.Cast(scale, to=onnx.TensorProto.FLOAT), flat)
    zeros = None if zero is None else op.Reshape(zero, flat)
    return MATMUL_NBITS(x, blocks, steps, zeros, None, bias, K=inputs, N=outputs, bits=4, block_size=group, accuracy_level=level)


def _table(ids: Any, weight: Any, scale: Any, bits: int, group: int, width: int) -> Any:
    """Look rows up as they are stored, then scale them."""
    rows = op.Gather(weight, ids)
    if bits == 4:
        integers = op.Sub(_unpacked(rows, width, len(ids.shape)), _constant(np.float32(8)))
    else:
        integers = op.Cast(rows, to=onnx.TensorProto.FLOAT)
    step = op.Cast(op.Gather(scale, ids), to=onnx.TensorProto.FLOAT)
    if not group:
        return op.Mul(integers, op.Unsqueeze(step, _constant(np.array([-1]))))
    return op.Mul(integers, op.Gather(step, _constant(np.arange(width) // group), axis=-1))


def _dequantized(weight: Any, scale: Any, zero: Any, stored: QuantizedLayer, inputs: int) -> Any:
    """Return the weight that integers stand for, float32 [in, out]: `(u - zero) * scale`."""
    bits, group = stored.bits, stored.group_size or 0
    if bits == 8 and zero is None and not group:
        # Transposed behind it: OpenVINO looks for the integers right before the dequantization.
        return op.Transpose(op.DequantizeLinear(weight, scale, axis=0), perm=[1, 0])
    outputs, groups = scale.shape[0], scale.shape[1] if group else 1
    integers = op.Cast(FOUR_BITS(weight) if bits == 4 else weight, to=onnx.TensorProto.FLOAT)
    step = op.Reshape(op.Cast(scale, to=onnx.TensorProto.FLOAT), _constant(np.array([outputs, groups])))
    if zero is not None:
        middle = _unpacked(zero, groups, 1) if bits == 4 else op.Cast(zero, to=onnx.TensorProto.FLOAT)
    else:  # symmetric eight-bit weights are stored as signed integers already
        middle = _constant(np.full((outputs, groups), 8 if bits == 4 else 0, dtype=np.float32))
    if groups == 1 or inputs % group == 0:
        integers = op.Reshape(integers, _constant(np.array([outputs, groups, inputs // groups])))
        middle, step = (op.Unsqueeze(each, _constant(np.array([2]))) for each in (middle, step))
    else:  # the last group is smaller
        owner = _constant(np.arange(inputs) // group)
        middle, step = (op.Gather(each, owner, axis=1) for each in (middle, step))
    values = op.Reshape(op.Mul(op.Sub(integers, middle), step), _constant(np.array([outputs, inputs])))
    return op.Transpose(values, perm=[1, 0])


def _unpacked(packed: Any, count: int, leading: int) -> Any:
    """Return four-bit integers one by one: uint8 [..., ceil(count / 2)] with `leading` dimensions before, to float32 [..., count].

    In floating point, where it is exact: not every runtime shifts the bits of bytes rightly (OpenVINO 2026.4 does not).
    """
    last = _constant(np.array([-1]))
    pairs = op.Cast(packed, to=onnx.TensorProto.FLOAT)
    high = op.Floor(op.Mul(pairs, _constant(np.float32(1 / 16))))
    low = op.Sub(pairs, op.Mul(high, _constant(np.float32(16))))
    both = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    rows = op.Reshape(both, _constant(np.array([0] * leading + [-1])))
    return op.Slice(rows, _constant(np.array([0])), _constant(np.array([count])), last) if count % 2 else rows


def _divided(x: Any, factor: Any) -> Any:
    return x if factor is None else op.Mul(x, op.Reciprocal(factor))


def _plus(x: Any, bias: Any) -> Any:
    return x if bias is None else op.Add(x, bias)


def _step(x: Any, per_token: bool) -> Any:
    """Return the scale of the symmetric grid that reaches to the largest magnitude of a token, or of the whole tensor."""
    over, kept = (_constant(np.array([-1])), 1) if per_token else (None, 0)
    largest = op.Max(op.ReduceMax(x, over, keepdims=kept), op.Neg(op.ReduceMin(x, over, keepdims=kept)))
    return op.Max(op.Div(largest, _constant(np.float32(QMAX))), _constant(np.float32(SMALLEST_SCALE)))


def _constant(value: Any) -> Any:
    return op.Constant(value=onnx.numpy_helper.from_array(np.asarray(value)))


def _operator(domain: str, name: str, inputs: str, attributes: tuple[str, ...] = ()) -> values.Op:
    """Describe an operator whose schema the onnx package does not have; of its `inputs`, those ending in ? may be left out."""
    kinds = [f"tensor({kind})" for kind in ("float", "uint8", "int8", "int32", "uint4")]
    schema = OpSchema(
        name,
        domain,
        1,
        inputs=[
            OpSchema.FormalParameter(given.rstrip("?"), f"T{index}", param_option=_option(given))
            for index, given in enumerate(inputs.split())
        ],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[(kind, kinds, "") for kind in ("T", *(f"T{index}" for index in range(len(inputs.split()))))],
        attributes=[OpSchema.Attribute(key, OpSchema.AttrType.INT, "", required=False) for key in attributes],
    )
    return values.Op(values.Opset(domain, 1), name, op_schema=schema)


def _option(parameter: str) -> OpSchema.FormalParameterOption:
    kinds = OpSchema.FormalParameterOption
    return kinds.Optional if parameter.endswith("?") else kinds.Single


CONTRIBUTED = "com.microsoft"
MATMUL_INTEGER_TO_FLOAT = _operator(CONTRIBUTED, "MatMulIntegerToFloat", "A B a_scale b_scale a_zero_point? b_zero_point? bias?")
MATMUL_NBITS = _operator(
    CONTRIBUTED, "MatMulNBits", "A B scales zero_points? g_idx? bias?", ("K", "N", "bits", "block_size", "accuracy_level")
)
# Says that bytes are pairs of four-bit integers; `lower` takes it away again and gives the weight that type.
FOUR_BITS = _operator("compress", "FourBits", "packed")
