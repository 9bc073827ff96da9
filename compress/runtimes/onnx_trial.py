"""Tries whether onnxruntime multiplies activations rounded in groups exactly on this CPU. Imports onnx, which only this needs."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from compress.runtimes.contract import INT8_LEVEL, OPSET


@functools.cache
def multiplies_groups(group_size: int) -> bool:
    """Whether `MatMulNBits` rounds activations in groups of this size as a variant says, and multiplies them exactly.

    Where onnxruntime has no such kernel for a CPU, it leaves activations in floating point without a word. All scales of the trial
    are one, so that its products and sums are exact: values halfway between two integers, and both ends of either grid. Few rows
    and many go to different kernels.
    """
    x = np.zeros((3, group_size), dtype=np.float32)
    x[0, :4], x[1], x[2, ::2], x[2, 1::2] = (127, 0.5, 1.5, -2.5), 127, 127, -127
    integers = np.repeat(np.array([[0], [15], [1]], dtype=np.uint8), group_size, axis=1)
    integers[2, 1::2] = 15
    session = onnxruntime.InferenceSession(_product(integers), providers=["CPUExecutionProvider"])
    expected = np.rint(x) @ (integers.astype(np.float32) - 8).T
    return all(
        np.array_equal(session.run(None, {"x": np.tile(x, (copies, 1))})[0], np.tile(expected, (copies, 1))) for copies in (1, 16)
    )


def _product(integers: np.ndarray) -> bytes:
    """Return a graph of one product by four-bit weights, uint8 [out, in] in one group with a scale of one."""
    outputs, inputs = integers.shape
    packed = (integers[:, ::2] | integers[:, 1::2] << 4)[:, None, :]
    product = helper.make_node(
        "MatMulNBits", ["x", "weight", "scale"], ["y"], domain="com.microsoft",
        K=inputs, N=outputs, bits=4, block_size=inputs, accuracy_level=INT8_LEVEL,
    )  # fmt: skip
    weights = [numpy_helper.from_array(packed, "weight"), numpy_helper.from_array(np.ones(outputs, dtype=np.float32), "scale")]
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width]) for name, width in (("x", inputs), ("y", outputs))
    )
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([product], "trial", [given], [made], weights)
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=versions, ir_version=10)
    return bytes(model.SerializeToString())
