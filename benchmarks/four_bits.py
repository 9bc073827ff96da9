"""Products by four-bit weights on this CPU, as torch and onnxruntime have them, against float32.

    python benchmarks/four_bits.py --outputs 1536 --inputs 384 --group 64

Milliseconds of processor time on one thread, medians of interleaved rounds; in parentheses how far the product is from the exact
one of the same weights and unrounded activations, relative to its largest value.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.common.machine import cpu_flags, cpu_name
from compress.layers.float_layers import OneDnnLinear
from compress.layers.grid import find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme
from compress.runtimes.contract import FLOAT32_LEVEL, INT8_LEVEL, OPSET

MOST_SECONDS = 0.5
"""Processor time after which a product is not run again for a number of tokens."""

Product = Callable[[torch.Tensor], torch.Tensor]


def matmul_nbits(layer: QuantizedLinear, level: int) -> Product:
    """Return onnxruntime's product at an accuracy level."""
    group = layer.layer.group_size or layer.in_features
    packed = layer.weight.numpy().reshape(layer.out_features, -1, group // 2)
    node = helper.make_node(
        "MatMulNBits", ["x", "weight", "scale"], ["y"], domain="com.microsoft",
        K=layer.in_features, N=layer.out_features, bits=4, block_size=group, accuracy_level=level,
    )  # fmt: skip
    weights = [
        numpy_helper.from_array(packed, "weight"),
        numpy_helper.from_array(layer.weight_scale.float().numpy().ravel(), "scale"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", layer.in_features), ("y", layer.out_features))
    ]
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=versions, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def torch_int4(layer: QuantizedLinear, dtype: torch.dtype) -> Product:
    """Return torch's own product; its scales and zeros are in the dtype of the activations."""
    group = layer.layer.group_size or layer.in_features
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(layer.integers().int(), 1)
    scale = layer.weight_scale.t().to(dtype)
    grid = torch.stack([scale, torch.zeros_like(scale)], dim=-1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(dtype), packed, group, grid)


def products(outputs: int, inputs: int, group: int) -> tuple[dict[str, Product], torch.Tensor]:
    """Return the products by name, float32's first, and the weight that all of them multiply, float32 [out, in]."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    grid = find_grid(weight, 4, group)
    layer = QuantizedLinear.from_integers(grid.round(weight), grid, None)
    rounding = QuantizedLinear.from_integers(grid.round(weight), grid, None, ActivationScheme.DYNAMIC_PER_GROUP)
    return {
        "float32 weights, oneDNN in torch": OneDnnLinear(layer.plain(), torch.float32),
        "int4, unpacked at each call, torch": layer,
        "int4, float32 activations, torch's own": torch_int4(layer, torch.float32),
        "int4, bfloat16 activations, torch's own": torch_int4(layer, torch.bfloat16),
        "int4, float32 activations, onnxruntime": matmul_nbits(layer, FLOAT32_LEVEL),
        "int4, int8 activations by group, torch": rounding,
        "int4, int8 activations by group, onnxruntime": matmul_nbits(layer, INT8_LEVEL),
    }, layer.dequantized()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=1536)
    parser.add_argument("--inputs", type=int, default=384)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 768])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    candidates, weight = products(arguments.outputs, arguments.inputs, arguments.group)
    named = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if flag in cpu_flags())
    print(f"{cpu_name()} ({named}), torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    cells: dict[str, list[str]] = {name: [] for name in candidates}
    for tokens in arguments.tokens:
        x = torch.randn(tokens, arguments.inputs, generator=torch.Generator().manual_seed(tokens))
        exact = x.double() @ weight.double().t()
        times: dict[str, list[float]] = {name: [] for name in candidates}
        error = {}
        with torch.inference_mode():
            for name, product in candidates.items():
                error[name] = float((product(x).double() - exact).abs().max() / exact.abs().max())
            for _ in range(arguments.rounds):
                for name, product in candidates.items():
                    if sum(times[name]) > MOST_SECONDS:
                        continue
                    start = time.process_time()
                    product(x)
                    times[name].append(time.process_time() - start)
        for name in candidates:
            cells[name].append(f"{1e3 * median(times[name]):.2f} ({error[name]:.0e})")
    print("| | " + " | ".join(f"{tokens} tokens" for tokens in arguments.tokens) + " |")
    print("|---|" + "---:|" * len(arguments.tokens))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
