"""Which runtimes there are and what each executes: a variant's own numbers, never others. No torch here.

A variant stores weights and, for each layer, how its activations are quantized (`compress.layers.scheme`). A runtime takes both as
they are or refuses the variant; it never quantizes anew. So what was calibrated is what runs, and the same integers have the same
scores whatever executes them, but for rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from compress.common.errors import UserError
from compress.common.machine import BYTE_PRODUCTS, multiplies_bytes_exactly
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer

INPUTS = ("input_ids", "attention_mask", "pool_mask")
"""Of a lowered graph; the last one only where a prompt's tokens are not pooled."""


# Padded tokens that a batch of the torch runtime holds unless told otherwise. On a CPU, what a batch of 1,024 tokens touches stays
# in the cache; a GPU needs many more to be busy (measured for MiniLM on two cores: 1,024 tokens are 1.1 to 1.7 times as fast as
# 4,096).
CPU_BATCH_TOKENS = 1_024
GPU_BATCH_TOKENS = 16_384


class RuntimeName(StrEnum):
    """What can execute a variant."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


@dataclass(frozen=True)
class Runtime:
    """What a runtime declares."""

    name: RuntimeName
    package: str
    """What executes."""
    opener: str
    """Our module whose `open_variant` makes an Embedder of a variant."""
    extra: str | None
    """The extra of this project that installs it; None: it is always installed."""
    schemes: frozenset[ActivationScheme]
    """How activations may be quantized, beside 8-bit integer weights."""
    bits: frozenset[int]
    """Of integer weights."""
    numbers: frozenset[Numbers]
    dtypes: frozenset[str]
    """Of the floating-point arithmetic on a CPU."""

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.package) is not None

    def refusal(self, name: str, layer: QuantizedLayer) -> str | None:
        """Say why the runtime does not execute a layer as it is stored; None: it does."""
        if layer.numbers not in self.numbers or layer.bits not in self.bits:
            return f"{self.name} does not execute {layer.name} weights ({name})"
        quantized = layer.activations is not ActivationScheme.NONE
        if layer.activations not in self.schemes or (quantized and self.name in GRAPH_RUNTIMES and layer.bits != 8):
            return f"{self.name} does not execute {layer.name} weights with activations {layer.activations} ({name})"
        return None


GRAPH_RUNTIMES = (RuntimeName.OPENVINO, RuntimeName.ONNXRUNTIME)
"""They execute a graph that `lower` has written, without torch."""
RUNTIMES = {
    RuntimeName.OPENVINO: Runtime(
        RuntimeName.OPENVINO,
        "openvino",
        "compress.runtimes.openvino_runtime",
        "openvino",
        frozenset({ActivationScheme.NONE, ActivationScheme.STATIC_PER_TENSOR}),
        frozenset({4, 8}),
        frozenset({Numbers.INTEGER}),
        frozenset({"float32", "bfloat16"}),
    ),
    RuntimeName.ONNXRUNTIME: Runtime(
        RuntimeName.ONNXRUNTIME,
        "onnxruntime",
        "compress.runtimes.onnx_runtime",
        None,
        frozenset(ActivationScheme),
        frozenset({4, 8}),
        frozenset({Numbers.INTEGER}),
        frozenset({"float32"}),
    ),
    RuntimeName.TORCH: Runtime(
        RuntimeName.TORCH,
        "torch",
        "compress.runtimes.torch_runtime",
        None,
        frozenset(ActivationScheme),
        frozenset(range(2, 9)),
        frozenset(Numbers),
        frozenset({"float32", "float16", "bfloat16"}),
    ),
}
"""Fastest first, as measured on CPUs with int8 or bfloat16 products (README)."""


def pick_runtime(
    wanted: str, quantized: Mapping[str, QuantizedLayer], *, device: str = "cpu", dtype: str | None = None
) -> RuntimeName:
    """Return the runtime that is to execute a variant.

    Args:
        wanted: a runtime's name, or `auto`: the fastest that is installed and executes every layer as it is stored.
        quantized: the variant's quantized layers, by name.
        device: on another device than a CPU only torch runs.
        dtype: of the arithmetic; None: any.

    Raises:
        UserError: the runtime is not installed, or does not execute a layer, the device or the dtype.
    """
    reasons = []
    for runtime in RUNTIMES.values() if wanted == "auto" else [RUNTIMES[RuntimeName(wanted)]]:
        reason = _refusal(runtime, quantized, device, dtype)
        if reason is None:
            return runtime.name
        reasons.append(reason)
    able = [other.name for other in RUNTIMES.values() if _refusal(other, quantized, device, dtype) is None]
    raise UserError("; ".join(reasons), f"these do: {', '.join(able)}" if able else "")


def _refusal(runtime: Runtime, quantized: Mapping[str, QuantizedLayer], device: str, dtype: str | None) -> str | None:
    if runtime.name in GRAPH_RUNTIMES and not device.startswith("cpu"):
        return f"{runtime.name} runs on the CPU here, not on {device}"
    if dtype is not None and device.startswith("cpu") and dtype not in runtime.dtypes:
        return f"{runtime.name} does not compute in {dtype}"
    for name, layer in quantized.items():
        reason = runtime.refusal(name, layer)
        if reason is not None:
            return reason
        if runtime.name in GRAPH_RUNTIMES and layer.activations is not ActivationScheme.NONE and not multiplies_bytes_exactly():
            return f"{runtime.name} would let products of bytes overflow on this CPU, which has none of {', '.join(BYTE_PRODUCTS)}"
    if not runtime.is_installed:
        return f"{runtime.name} is not installed: pip install 'compress-embedders[{runtime.extra}]'"
    return None


def graph_file(folder: Path, runtime: str) -> Path:
    """Return where the graph of a variant lies that a runtime executes: beside the weights, which it refers to."""
    return folder / f"{runtime}.onnx"
