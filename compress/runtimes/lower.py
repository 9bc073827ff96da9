"""A variant becomes an ONNX graph that a runtime executes without torch; its weights stay where they are, in the variant's files.

The network is traced with one operator for each compressed layer, which `lowered_layers` spells out for the runtime; the graph goes
from token ids to vectors, pooling, NV-Embed's head and normalisation included. Every weight of it is a reference into the variant's
safetensors files (ONNX external data: file, offset, length), so it has the same bytes in every runtime and is stored once.
"""

from __future__ import annotations

import argparse
import copy
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
from compress.models.files.headers import MASK, StoredTensor, stored_tensors
from compress.models.files.shards import write_tensors
from compress.models.files.variant import WEIGHTS_FILE
from compress.models.folder import ModelFolder
from compress.models.network.pooling import TracedNetwork, backbone_of
from compress.models.opened import empty_model
from compress.runtimes.contract import GRAPH_RUNTIMES, OPSET, graph_file, graph_inputs, runtime_named
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
        refused = runtime_named(runtime).refusal(name, layer, stand_in.width, table=isinstance(stand_in, TracedTable))
        if refused is not None:
            raise UserError(f"{folder}: {refused}", "another group_size, or another runtime")
        network.set_submodule(name, stand_in)
    unread = _without_values(network)
    # Plain products and a softmax: both runtimes find attention in them and fuse it.
    backbone = backbone_of(network)
    if isinstance(backbone, PreTrainedModel):
        backbone.set_attn_implementation("eager")
    names = graph_inputs(info.spec.pool_prompt)
    # A tensor of its own for each: one that is given twice would be traced as one input.
    tokens = {name: torch.ones(TRACED_TEXTS, TRACED_TOKENS, dtype=torch.int64) for name in names}
    model = _graph(TracedNetwork(network), tokens, "vectors", runtime)
    _finish(model, stored, unread)
    return _saved(model, graph_file(folder.path, runtime))


def lower_layer(layer: nn.Module, folder: Path, runtime: str) -> Path:
    """Write the graph of a linear layer alone, float32 [texts, tokens, in] to [texts, tokens, out], and its weights next to it.

    Args:
        layer: an `nn.Linear`, whose weights are stored in half precision, or a layer as a variant stores it.
        folder: an empty folder.
        runtime: the runtime that is to execute it.
    """
    stand_in = traced(layer) if isinstance(layer, CompressedLayer) else copy.deepcopy(layer).half()
    network = nn.ModuleDict({"layer": stand_in})
    write_tensors(folder / WEIGHTS_FILE, network.state_dict())
    network.to("meta")
    unread = _without_values(network)
    rows = torch.ones(TRACED_TEXTS, TRACED_TOKENS, int(layer.in_features))  # type: ignore[arg-type]
    model = _graph(_Alone(network), {"rows": rows}, "rows_after", runtime)
    _finish(model, stored_tensors(folder), unread)
    return _saved(model, graph_file(folder, runtime))


class _Alone(nn.Module):
    """A layer by itself, under the names that `_finish` looks for."""

    def __init__(self, network: nn.ModuleDict) -> None:
        super().__init__()
        self.network = network

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [texts, tokens, in] to [texts, tokens, out]."""
        made: torch.Tensor = self.network["layer"](rows)
        return made


def _graph(network: nn.Module, inputs: Mapping[str, torch.Tensor], output: str, runtime: str) -> ir.Model:
    """Trace a network; the first two dimensions of its inputs are left free."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of torchvision, which no text network needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own, about its own code
        program = torch.onnx.export(
            network.eval(),
            tuple(inputs.values()),
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=tuple({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for _ in inputs),
            custom_translation_table=translations(runtime),
        )
    assert program is not None
    model: ir.Model = program.model
    return model


def _saved(model: ir.Model, path: Path) -> Path:
    with replacing(path) as temporary:
        ir.save(model, temporary, format="protobuf")
    return path


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
