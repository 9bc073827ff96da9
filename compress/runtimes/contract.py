"""The table of runtimes, and what each of them executes. No torch here.

A variant stores weights and, for each layer, how its activations are quantized (`compress.layers.scheme`). A runtime executes
both as stored or refuses the variant; it never quantizes anew. So the numbers that were calibrated are the numbers that run, and
the same integers score the same in every runtime, up to rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from compress.common.errors import UserError, nearest
from compress.common.inputs import check_file
from compress.common.machine import BYTE_PRODUCTS, multiplies_bytes_exactly
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer

TORCH = "torch"
"""The runtime that checkpoints run in, and the default of a recipe."""
NUMPY = "numpy"
"""The runtime of static tables, and the one that `compress.load` opens them in."""
GPTQ = "gptq"
"""The runtime that multiplies in GPTQModel's kernels."""
AUTO = "auto"
"""In place of a runtime's name: the fastest runtime that is installed and executes the model as it is stored."""
# Default for the padded tokens in a batch of the torch runtime. On a CPU, what a batch of 1,024 tokens touches stays in the cache;
# a GPU needs many more to be busy (measured for MiniLM on two cores: 1,024 tokens are 1.1 to 1.7 times as fast as 4,096).
CPU_BATCH_TOKENS = 1_024
GPU_BATCH_TOKENS = 16_384
# Rows of a packed batch: at most so many, at least so many where little memory is free.
MOST_PACKED_TOKENS, LEAST_PACKED_TOKENS = 32_768, 1_024
PACKED_SHARE = 0.5
"""Share of a card's free memory that a packed batch may take up."""

# Of the graphs that runtimes execute: version of the operators, and accuracy levels of `MatMulNBits`. Activations stay in float32,
# or become int8 with one scale per token and group of inputs.
OPSET, FLOAT32_LEVEL, INT8_LEVEL = 21, 1, 4

PACKED, PADDED = "packed", "padded"
Batching = Literal["auto", "packed", "padded"]
"""How texts share a batch: end to end, or padded to one length. `auto` packs on a CUDA card where the network can be packed."""


def packed_budget(free_bytes: int, token_bytes: int) -> int:
    """Return how many tokens a packed batch may hold.

    Args:
        free_bytes: memory of the card that is free once the weights are loaded.
        token_bytes: memory that a token takes up while it passes a block; see `ModelShape.activation_bytes`.
    """
    return max(LEAST_PACKED_TOKENS, min(MOST_PACKED_TOKENS, int(PACKED_SHARE * free_bytes) // token_bytes))


@contextmanager
def opening(graph: Path) -> Iterator[None]:
    """Say of which file a graph is that its runtime refuses: broken, or with weights outside of its folder.

    Raises:
        UserError: it does.
    """
    check_file(graph)
    try:
        yield
    except Exception as error:  # of the runtime's own kinds
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{graph}: its runtime does not open it ({reason})", "remove the file, if it can be made again") from error


@dataclass(frozen=True)
class Runtime:
    """What a runtime declares: everything that the rest of the project knows of it."""

    name: str
    package: str
    """Python package that must be installed."""
    opener: str
    """Our module whose `open_variant` opens a variant as an Embedder; of a runtime that executes graphs, its `open_graph` opens any
    graph."""
    extra: str | None
    """The extra of this project that installs the package; None: the package is always installed."""
    numbers: frozenset[Numbers]
    """Kinds of weights that it executes."""
    bits: frozenset[int]
    """Bits of the integer weights that it executes."""
    schemes: frozenset[ActivationScheme]
    """Activation schemes that it executes."""
    product_bits: frozenset[int]
    """Bits of the weights that it multiplies with quantized activations that have one scale per token or tensor."""
    dtypes: frozenset[str]
    """Dtypes of the floating-point arithmetic on a CPU; of a runtime for cards alone, on a card."""
    grouped_bits: frozenset[int] = frozenset()
    """Bits of the weights that it multiplies with activations that have one scale per group of inputs."""
    grouped_sizes: frozenset[int] | None = None
    """Sizes of the groups in such products; None: any."""
    linear: str | None = None
    """For a runtime that executes a graph: `module:function` that writes a quantized linear layer into the graph, see
    `compress.runtimes.lowered_layers`. None: the runtime needs no graph."""
    cpu_only: bool = False
    """Whether it runs on a CPU only."""
    cuda_only: bool = False
    """Whether it runs on a CUDA card only; it then runs in torch, and its opener also takes `device` and `batching`."""
    byte_products: bool = False
    """Whether products of quantized activations with eight-bit weights need byte instructions that do not overflow
    (`BYTE_PRODUCTS`). Those of four-bit weights never do: two of at most 15 x 127 fit into 16 bits."""
    uneven_groups: bool = True
    """Whether the last group of four-bit weights may be smaller than the others."""
    static_only: bool = False
    """Whether it executes static tables only; it is then not offered for other models."""
    checkpoints: bool = False
    """Whether it also opens checkpoints, not only variants."""

    def overflows(self, layer: QuantizedLayer) -> bool:
        """Whether products of a layer would overflow on this machine."""
        bytes_by_bytes = layer.activations is not ActivationScheme.NONE and layer.bits == 8
        return self.byte_products and bytes_by_bytes and not multiplies_bytes_exactly()

    @property
    def is_installed(self) -> bool:
        """Whether its package can be imported."""
        return importlib.util.find_spec(self.package) is not None

    def refusal(self, name: str, layer: QuantizedLayer, width: int | None = None, *, table: bool = False) -> str | None:
        """Say why the runtime does not execute a layer as it is stored; None: it does.

        Args:
            name: the layer's name.
            layer: how it is stored.
            width: number of its inputs, or of a table's columns; None: any.
            table: whether it is a table, whose rows are scaled one by one.
        """
        if layer.numbers not in self.numbers or layer.bits not in self.bits:
            return f"{self.name} does not execute {layer.name} weights ({name})"
        grouped = layer.activations is ActivationScheme.DYNAMIC_PER_GROUP
        bits = self.bits if layer.activations is ActivationScheme.NONE else self.grouped_bits if grouped else self.product_bits
        if layer.activations not in self.schemes or layer.bits not in bits:
            return f"{self.name} does not execute {layer.name} weights with activations {layer.activations} ({name})"
        if grouped and self.grouped_sizes is not None and layer.group_size not in self.grouped_sizes:
            sizes = ", ".join(map(str, sorted(self.grouped_sizes)))
            return f"{self.name} rounds activations in groups of {sizes}, not of {layer.group_size} ({name})"
        if width is None or self.linear is None or layer.bits != 4:
            return None
        if width % 2:
            return f"{name} has rows of {width} four-bit integers; graphs take only even rows"
        ragged = layer.group_size and not table and width > layer.group_size and width % layer.group_size
        if ragged and not self.uneven_groups:
            groups = f"in groups of {layer.group_size}; {self.name} takes only groups that divide the inputs"
            return f"{name} has {width} four-bit inputs {groups}"
        return None


_STATIC = frozenset({ActivationScheme.NONE, ActivationScheme.STATIC_PER_TENSOR})
_ALL_SCHEMES = _STATIC | {
    ActivationScheme.DYNAMIC_PER_TENSOR,
    ActivationScheme.DYNAMIC_PER_TOKEN,
    ActivationScheme.DYNAMIC_PER_GROUP,
}
RUNTIMES: Mapping[str, Runtime] = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            name=NUMPY,
            package="numpy",
            opener="compress.runtimes.numpy_runtime",
            extra=None,
            numbers=frozenset({Numbers.INTEGER}),
            bits=frozenset(range(2, 9)),
            schemes=frozenset({ActivationScheme.NONE}),
            product_bits=frozenset(),
            dtypes=frozenset({"float32"}),
            cpu_only=True,
            static_only=True,
            checkpoints=True,
        ),
        Runtime(
            name="openvino",
            package="openvino",
            opener="compress.runtimes.openvino_runtime",
            extra="openvino",
            numbers=frozenset({Numbers.INTEGER}),
            bits=frozenset({4, 8}),
            schemes=_STATIC,
            product_bits=frozenset({8}),
            dtypes=frozenset({"float32", "bfloat16"}),
            linear="compress.runtimes.lowered_layers:openvino_linear",
            cpu_only=True,
            byte_products=True,
            uneven_groups=False,  # OpenVINO 2026.4 divides by zero, and the process ends
        ),
        Runtime(
            name="onnxruntime",
            package="onnxruntime",
            opener="compress.runtimes.onnx_runtime",
            extra=None,
            numbers=frozenset({Numbers.INTEGER}),
            bits=frozenset({4, 8}),
            schemes=_ALL_SCHEMES,
            product_bits=frozenset({8}),
            grouped_bits=frozenset({4}),
            grouped_sizes=frozenset({16, 32, 64, 128, 256}),
            dtypes=frozenset({"float32"}),
            linear="compress.runtimes.lowered_layers:onnxruntime_linear",
            cpu_only=True,
            byte_products=True,
        ),
        Runtime(
            name=TORCH,
            package="torch",
            opener="compress.runtimes.torch_runtime",
            extra=None,
            numbers=frozenset(
                {
                    Numbers.INTEGER,
                    Numbers.FLOAT8,
                    Numbers.LLM_INT8,
                    Numbers.NF4,
                    Numbers.FP4,
                    Numbers.MXFP4,
                    Numbers.NVFP4,
                }
            ),
            bits=frozenset(range(2, 9)),
            schemes=_ALL_SCHEMES,
            product_bits=frozenset(range(2, 9)),
            grouped_bits=frozenset(range(2, 9)),
            dtypes=frozenset({"float32", "float16", "bfloat16"}),
            checkpoints=True,
        ),
        Runtime(
            name=GPTQ,
            package="gptqmodel",
            opener="compress.runtimes.gptq_runtime",
            extra="gptq",
            numbers=frozenset({Numbers.INTEGER}),
            bits=frozenset({2, 3, 4, 8}),
            schemes=frozenset({ActivationScheme.NONE}),
            product_bits=frozenset(),
            dtypes=frozenset({"float16", "bfloat16"}),
            cuda_only=True,  # last, so that `auto` does not take it: it has not run on a card yet
        ),
    )
}
"""The runtimes by name, fastest first, as measured on CPUs with int8 or bfloat16 products. A new runtime is a row here and the
module that the row names; help, schema and refusals follow from the row."""
GRAPH_RUNTIMES = tuple(runtime.name for runtime in RUNTIMES.values() if runtime.linear is not None)
"""Names of the runtimes that execute a graph written by `lower`, without torch."""


def usual_device(name: str) -> str:
    """Return the device to plan with where none is named: the card for a runtime that needs one, else the CPU."""
    return "cuda" if name in RUNTIMES and RUNTIMES[name].cuda_only else "cpu"


def runtime_named(name: str) -> Runtime:
    """Return a runtime of the table.

    Raises:
        UserError: there is no such runtime; names the nearest one.
    """
    if name not in RUNTIMES:
        raise UserError(f"runtime {name!r} is not known", nearest(name, [AUTO, *RUNTIMES]))
    return RUNTIMES[name]


@dataclass(frozen=True)
class Kind:
    """What kind of model a runtime is asked to execute."""

    static: bool = False
    """Whether it is a static table."""
    checkpoint: bool = False
    """Whether it is a checkpoint, not a variant."""


def pick_runtime(
    wanted: str,
    quantized: Mapping[str, QuantizedLayer],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    kind: Kind = Kind(),
    widths: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Return the name of the runtime that is to execute a model.

    Args:
        wanted: a runtime's name, or `auto`: the fastest that is installed and executes every layer as it is stored.
        quantized: the variant's quantized layers, by name.
        device: device to run on; only torch runs on other devices than a CPU.
        dtype: dtype of the arithmetic; None: any.
        kind: what kind of model it is; by default a variant with blocks.
        widths: numbers of inputs of quantized linear layers, by name, as far as they are known.

    Raises:
        UserError: the runtime is not known, is not installed, or does not execute a layer, the device or the dtype.
    """
    reasons = []
    offered = [runtime for runtime in RUNTIMES.values() if not _unfit(runtime, kind)]
    for runtime in offered if wanted == AUTO else [runtime_named(wanted)]:
        reason = _unfit(runtime, kind) or _refusal(runtime, quantized, device, dtype, widths)
        if reason is None:
            return runtime.name
        reasons.append(reason)
    able = [other.name for other in offered if _refusal(other, quantized, device, dtype, widths) is None]
    raise UserError("; ".join(reasons), f"these do: {', '.join(able)}" if able else "")


def _unfit(runtime: Runtime, kind: Kind) -> str | None:
    if runtime.static_only and not kind.static:
        return f"{runtime.name} executes static tables only"
    if kind.checkpoint and not runtime.checkpoints:
        return f"{runtime.name} executes variants, and this is a checkpoint"
    return None


def _refusal(
    runtime: Runtime, quantized: Mapping[str, QuantizedLayer], device: str, dtype: str | None, widths: Mapping[str, int]
) -> str | None:
    if runtime.cpu_only and not device.startswith("cpu"):
        return f"{runtime.name} runs on the CPU here, not on {device}"
    if runtime.cuda_only and not device.startswith("cuda"):
        return f"{runtime.name} runs on a CUDA card, not on {device}"
    if dtype is not None and (device.startswith("cpu") or runtime.cuda_only) and dtype not in runtime.dtypes:
        return f"{runtime.name} does not compute in {dtype}"
    for name, layer in quantized.items():
        reason = runtime.refusal(name, layer, widths.get(name))
        if reason is not None:
            return reason
        if runtime.overflows(layer):
            return f"{runtime.name} would let byte products overflow on this CPU, which has none of {', '.join(BYTE_PRODUCTS)}"
    if not runtime.is_installed:
        how = f"compress-embedders[{runtime.extra}]" if runtime.extra else runtime.package
        return f"{runtime.name} is not installed: pip install '{how}'"
    return None


def graph_inputs(pool_prompt: bool) -> tuple[str, ...]:
    """Return the names of a graph's inputs, int64 [texts, tokens] each.

    `pool_prompt`: whether a prompt's tokens enter the pooling; otherwise the graph takes a mask of the pooled tokens too.
    """
    return ("input_ids", "attention_mask") if pool_prompt else ("input_ids", "attention_mask", "pool_mask")


def graph_file(folder: Path, runtime: str) -> Path:
    """Return the path of a variant's graph for a runtime: next to the weights, which the graph refers to."""
    return folder / f"{runtime}.onnx"
