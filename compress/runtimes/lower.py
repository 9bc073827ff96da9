"""A variant becomes an ONNX graph that a runtime executes without torch; its weights stay where they are, in the variant's files.

The network is traced with one operator for each compressed layer, which `lowered_layers` spells out for the runtime; the graph goes
from token ids to vectors, pooling, NV-Embed's head and normalisation included. Every weight of it is a reference into the variant's
safetensors files (ONNX external data: file, offset, length), so it has the same bytes in every runtime and is stored once.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, CommonSubexpressionEliminationPass
from onnxscript.optimizer import optimize_ir
from torch import nn
from transformers import PreTrainedModel

from compress.common.errors import UserError
from compress.common.files import replacing
from compress.layers.compressed import CompressedLayer
from compress.models.files.headers import MASK, StoredTensor
from compress.models.folder import ModelFolder
from compress.models.network.pooling import TracedNetwork, backbone_of
from compress.models.opened import empty_model
from compress.runtimes.contract import GRAPH_RUNTIMES, OPSET, RUNTIMES, graph_file, graph_inputs, runtime_named
from compress.runtimes.lowered_layers import FOUR_BITS, TracedLinear, TracedTable, traced, translations

# The batch that is traced; its sizes are left free in the graph. Not 1, which tracing takes for a constant.
TRACED_TEXTS, TRACED_TOKENS = 2, 5
DTYPES = {
    "F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "I64": ir.DataType.INT64,
    "I32": ir.DataType.INT32, "I8": ir.DataType.INT8, "U8": ir.DataType.UINT8,
}  # fmt: skip


def lower(folder: ModelFolder, runtime: str) -> Path:
    """Write the graph of a variant for a runtime into the variant's folder, in the place of what was there.

    Takes the memory of the graph alone: the weights are not read.

    Raises:
        UserError: a layer is stored in a way for which the graph has no words.
    """
    info = folder.compressed
    stored = folder.tensors
    for name in stored:
        if name.endswith(MASK):
            raise UserError(
                f"{folder.path}: {name.removesuffix(MASK)} is stored without its zeros, which {runtime} cannot refer to",
                f"make the variant for it: runtime: {runtime} in the recipe",
            )
    network = empty_model(folder)
    for name, layer in info.quantized.items():
        refused = runtime_named(runtime).refusal(name, layer)
        if refused is not None:
            raise UserError(f"{folder}: {refused}")
        module = network.get_submodule(name)
        assert isinstance(module, CompressedLayer)
        stand_in = traced(module)
        if layer.bits == 4:
            group_size = layer.group_size if isinstance(stand_in, TracedLinear) else None  # of a table, rows are scaled one by one
            _check_four_bits(f"{folder.path}: {name}", stand_in.width, group_size, runtime)
        network.set_submodule(name, stand_in)
    unread = _without_values(network)
    # Plain products and a softmax: both runtimes find attention in them and fuse it.
    backbone = backbone_of(network)
    if isinstance(backbone, PreTrainedModel):
        backbone.set_attn_implementation("eager")
    names = graph_inputs(info.spec.pool_prompt)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which no text network needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, about its own code
        program = torch.onnx.export(
            TracedNetwork(network).eval(),
            tuple(torch.ones(TRACED_TEXTS, TRACED_TOKENS, dtype=torch.int64) for _ in names),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(names),
            output_names=["vectors"],
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in names),
            custom_translation_table=translations(runtime),
        )
    assert program is not None
    _finish(program.model, stored, unread)
    path = graph_file(folder.path, runtime)
    with replacing(path) as temporary:
        ir.save(program.model, temporary, format="protobuf")
    return path


def _check_four_bits(place: str, width: int, group_size: int | None, runtime: str) -> None:
    """See that a runtime takes four-bit rows of this width.

    Raises:
        UserError: it does not.
    """
    if width % 2:
        raise UserError(f"{place} has rows of {width} four-bit integers; graphs take only even rows")
    if not runtime_named(runtime).uneven_groups and group_size and width > group_size and width % group_size:
        others = " or ".join(name for name in GRAPH_RUNTIMES if RUNTIMES[name].uneven_groups)
        raise UserError(
            f"{place} has {width} four-bit inputs in groups of {group_size}; {runtime} takes only groups that divide the inputs",
            f"another group_size, or runtime: {others}",
        )


def _without_values(network: nn.Module) -> list[str]:
    """Give tensors without values memory that is never touched, floating point in float32; return their names.

    Tracing wants tensors on a device that it can run on, and never looks into them.
    """
    unread = []
    for path, module in network.named_modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not tensor.is_meta:
                continue
            unread.append(f"{path}.{name}")
            own = isinstance(module, TracedLinear | TracedTable) and name != "bias"
            dtype = tensor.dtype if own or not tensor.is_floating_point() else torch.float32
            made = torch.empty(tensor.shape, dtype=dtype)
            setattr(module, name, nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made)
    return unread


def _finish(model: ir.Model, stored: Mapping[str, StoredTensor], unread: Sequence[str]) -> None:
    """Simplify a traced graph, and let its weights be those of the files."""
    graph = model.graph
    weights = {name: graph.initializers.pop(f"network.{name}") for name in unread if f"network.{name}" in graph.initializers}
    for value in weights.values():
        value.const_value = None  # there is none, and simplifying must not compute with what lies in its memory
        graph.inputs.append(value)
    _share_inputs(weights, stored)
    optimize_ir(model)
    CommonSubexpressionEliminationPass()(model)
    for name, value in weights.items():
        graph.inputs.remove(value)
        _refer(graph, value, name, stored[name])
    model.opset_imports.pop(FOUR_BITS.opset.domain, None)
    ClearMetadataAndDocStringPass()(model)


def _share_inputs(weights: Mapping[str, ir.Value], stored: Mapping[str, StoredTensor]) -> None:
    """Let layers that have one input, and so the same scale and factor of it, use one of the copies: it is then rounded once."""
    first: dict[bytes, ir.Value] = {}
    for name, value in weights.items():
        if name.endswith((".input_scale", ".input_factor")):
            ir.convenience.replace_all_uses_with(value, first.setdefault(stored[name].read(), value))


def _refer(graph: ir.Graph, value: ir.Value, name: str, stored: StoredTensor) -> None:
    """Make a weight a reference to its bytes, cast where it is stored in another dtype than the one it was traced in."""
    for node, _ in list(value.uses()):
        if node.op_type == FOUR_BITS.name:
            rows, width = stored.info.shape
            pairs = _initializer(graph, f"{name}.pairs", stored, ir.DataType.UINT4, (rows, 2 * width))
            ir.convenience.replace_all_uses_with(node.outputs[0], pairs)
            graph.remove(node, safe=True)
    if not value.uses():
        return
    kept = _initializer(graph, name, stored, DTYPES[stored.info.dtype], stored.info.shape)
    if kept.dtype == value.dtype:
        ir.convenience.replace_all_uses_with(value, kept)
        return
    for node, index in list(value.uses()):
        if node.op_type != "Gather" or index != 0:
            continue
        # Rows are cast after the lookup, so that a table stays as small as it is stored.
        looked_up = node.outputs[0]
        cast = _cast(looked_up, value)
        ir.convenience.replace_all_uses_with(looked_up, cast.outputs[0])
        cast.replace_input_with(0, looked_up)
        node.replace_input_with(0, kept)
        looked_up.type = kept.type
        graph.insert_after(node, cast)
    if value.uses():
        cast = _cast(kept, value)
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _cast(value: ir.Value, traced: ir.Value) -> ir.Node:
    """Return a node that casts a value to the dtype in which a weight was traced."""
    assert traced.dtype is not None
    cast = ir.node("Cast", [value], {"to": int(traced.dtype)})
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(traced.dtype), value.shape
    return cast


def _initializer(graph: ir.Graph, name: str, stored: StoredTensor, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
    """Add a weight that lies in a file."""
    sizes = ir.Shape(shape)
    tensor = ir.ExternalTensor(stored.path.name, stored.info.offset, stored.info.bytes, dtype, shape=sizes, name=name)
    value = ir.Value(name=name, shape=sizes, type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def main() -> None:
    """Lower a variant in a process of its own; `graph_embedder` calls it, so that its process needs no torch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("runtime", choices=GRAPH_RUNTIMES)
    arguments = parser.parse_args()
    lower(ModelFolder(arguments.folder.name, arguments.folder), arguments.runtime)


if __name__ == "__main__":
    main()
