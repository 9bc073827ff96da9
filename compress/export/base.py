"""Shared by the layouts of torch checkpoints: opening a variant, checking its layers, writing its tensors and its config."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.common.errors import UserError
from compress.common.files import write_json
from compress.layers.compressed import CompressedLayer, CompressedLinear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.scheme import Numbers, QuantizedLayer
from compress.models.files.shards import join_shards, shard, write_tensors
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.network.build import auto_class
from compress.models.network.pooling import TokenPooling, head_of
from compress.models.network.segments import HEAD, Kind, Segment, segments_of
from compress.models.network.walk import Streamed
from compress.models.opened import empty_model, weights_of

Convert = Callable[[Any], dict[str, torch.Tensor]]
"""Converts a quantized linear layer to its tensors in a layout, without the bias."""


@dataclass(frozen=True)
class Exportable:
    """A variant that is about to be written in another layout; its weights are still in its files."""

    info: VariantInfo
    folder: ModelFolder
    network: nn.Module
    """The network on the meta device."""
    linears: dict[str, QuantizedLayer]
    """Quantized linear layers by name."""
    tables: list[str]
    """Names of quantized embedding tables."""
    plain: list[str]
    """Names of linear layers that are not quantized, including those that only the reader's network has (BERT's pooler)."""
    blocks: str
    """Name of the list of blocks."""
    prefix: str
    """Prefix of every name in the checkpoint of a model with a task head: `model.`, `bert.`."""

    def shape(self, name: str) -> tuple[int, int]:
        """Return the numbers of outputs and inputs of a quantized linear layer."""
        layer = self.network.get_submodule(name)
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def open_for_export(source: ModelFolder, layout: str, numbers: frozenset[Numbers] | None = None) -> Exportable:
    """Open a variant for writing.

    Args:
        source: the variant.
        layout: name of the layout, for errors.
        numbers: kinds of weights that the layout stores as they are; at least one linear layer must then be quantized. None: the
            layout is not asked here, or stores half-precision values.

    Raises:
        UserError: a static table; NV-Embed's architecture, which only its own code runs; weights that the layout does not store; a
            layer that divides its input; blocks that the architecture's config cannot describe; texts that end in a token of their
            own.
    """
    info = source.compressed
    if source.is_static:
        raise UserError(
            f"{source.name}: cannot be written as {layout}: it is a static table, which has no blocks",
            "sentence-transformers, model2vec, onnx and openvino hold it",
        )
    network = empty_model(source)
    pooling = head_of(network).pooling
    if not isinstance(pooling, TokenPooling):
        raise UserError(
            f"{source.name}: NV-Embed's latent-attention head cannot be stored in {layout} files",
            "onnx and openvino store it; or replace it with the steps mean_pooling and distill",
        )
    if info.spec.rotated:
        raise UserError(
            f"{source.name}: cannot be written as {layout}: its token vectors are rotated back before they are pooled, which other "
            "libraries do not do",
            "onnx and openvino store it; or rotate with `stream: false`",
        )
    tables = [name for name in info.quantized if isinstance(network.get_submodule(name), QuantizedEmbedding)]
    linears = {name: layer for name, layer in info.quantized.items() if name not in tables}
    if numbers is not None:
        check_linears(linears, layout, numbers)
    if not linears and numbers is not None:
        raise UserError(f"{source.name}: no linear layer is quantized", "export it as sentence-transformers")
    if info.heads is not None or info.blocks or info.dropped:
        lacks = f"{info.heads} heads a block" if info.heads is not None else f"{len(info.dropped)} blocks without a sublayer"
        lacks = "blocks of different widths" if info.blocks else lacks
        kind = source.config["model_type"]
        raise UserError(
            f"{source.name}: cannot be written as {layout}: it has {lacks}, which a {kind} config cannot say",
            "onnx and openvino hold it; or prune only whole blocks, and the same share of the MLP channels in each",
        )
    if info.spec.suffix:
        raise UserError(
            f"{source.name}: cannot be written as {layout}: texts end in {info.spec.suffix!r}, which other libraries do not add",
            "use the variant as it is (compress encode)",
        )
    with torch.device("meta"):
        full = auto_class(source).from_config(copy.deepcopy(source.network_config))
    plain = [name for name, module in full.named_modules() if isinstance(module, nn.Linear) and name not in linears]
    block = next(segment for segment in segments_of(network) if segment.kind is Kind.BLOCK)
    prefix = str(getattr(network, "base_model_prefix", "") or "")
    return Exportable(
        info, source, network, linears, tables, plain, block.paths[0].rpartition(".")[0], f"{prefix}." if prefix else ""
    )


def check_linears(linears: Mapping[str, QuantizedLayer], layout: str, numbers: frozenset[Numbers]) -> None:
    """Check that a layout stores the weights of linear layers, and that these take their input as it is.

    Raises:
        UserError: the weights are of another kind than `numbers`, or a layer divides its input; names the layer.
    """
    for name, layer in linears.items():
        check_numbers(name, layer, layout, numbers)
        if layer.input_factor:
            raise refusal(
                name,
                layout,
                "need their input divided channel by channel first",
                "awq and smoothquant avoid that with `keep_factors: false`; rtn and gptq never need it",
            )


def check_numbers(name: str, layer: QuantizedLayer, layout: str, numbers: frozenset[Numbers]) -> None:
    """Check that a layout stores a layer's kind of weights.

    Raises:
        UserError: the kind is not in `numbers`; a kind that is added later is refused until the layout lists it.
    """
    if layer.numbers not in numbers:
        stored = ", ".join(sorted(numbers))
        hint = "rtn, gptq and awq make integers; compressed-tensors stores fp8, mxfp4 and nvfp4 too"
        raise refusal(name, layout, f"are {layer.numbers} numbers, and it stores {stored}", hint)


def refusal(name: str, layout: str, why: str, hint: str) -> UserError:
    """Return the error of a layout that cannot store a layer; `why` continues the sentence after "its weights"."""
    return UserError(f"{name}: cannot be written as {layout}: its weights {why}", hint)


def write_weights(opened: Exportable, folder: Path, convert: Convert, prefix: str = "") -> None:
    """Write a variant's tensors, segment by segment: quantized linear layers converted, tables in half precision, others as stored.

    `prefix`: prefix of every name.
    """
    segments = [segment for segment in segments_of(opened.network) if segment.paths != (HEAD,)]
    parts = len(segments)
    for index, (layers, tensors) in enumerate(stored(opened, segments)):
        for name, layer in layers.items():
            converted = {"weight": _half_table(layer)} if isinstance(layer, QuantizedEmbedding) else convert(layer)
            tensors |= {f"{name}.{key}": tensor for key, tensor in converted.items()}
        write_tensors(shard(folder, index, parts), {f"{prefix}{name}": tensor for name, tensor in tensors.items()})
    join_shards(folder, parts)


def head_tensors(opened: Exportable, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a module of the head, named as there, in float32, by the names that its own file has."""
    (module,) = Streamed(opened.network, weights_of(opened.folder, opened.network)).load(Segment(Kind.HEAD, (HEAD,))).values()
    state = module.get_submodule(name).state_dict()
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def stored(
    opened: Exportable, segments: Sequence[Segment] | None = None
) -> Iterator[tuple[dict[str, CompressedLayer], dict[str, torch.Tensor]]]:
    """Read a variant, segment by segment: its compressed layers by name, and all other tensors, including the layers' biases.

    `segments`: those to be read; None: all.
    """
    source = Streamed(opened.network, weights_of(opened.folder, opened.network))
    for segment in segments_of(opened.network) if segments is None else segments:
        layers: dict[str, CompressedLayer] = {}
        tensors: dict[str, torch.Tensor] = {}
        for path, part in source.load(segment).items():
            inside = {
                f"{path}.{inner}" if inner else path: module
                for inner, module in part.named_modules()
                if isinstance(module, CompressedLayer)
            }
            layers |= inside
            for key, tensor in part.state_dict().items():
                layer, _, kind = f"{path}.{key}".rpartition(".")
                if layer not in inside or kind == "bias":
                    tensors[f"{layer}.{kind}"] = tensor
        yield layers, tensors


def half_values(layer: CompressedLinear) -> dict[str, torch.Tensor]:
    """Return the dequantized weight of a linear layer, in half precision."""
    return {"weight": layer.values().half()}


def write_config(
    opened: Exportable, folder: Path, quantization: Mapping[str, Any] | None, dtype: str, changes: Mapping[str, Any]
) -> None:
    """Write the model's `config.json` with its quantization, if any.

    `dtype`: default dtype of readers, written under its current name and that of transformers 4.
    """
    config = copy.deepcopy(opened.folder.config)
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:  # where transformers 4 expects it
        config.setdefault("rope_theta", rope["rope_theta"])
    if opened.info.spec.layers is not None:
        config["output_hidden_states"] = True  # without it, sentence-transformers passes over WeightedLayerPooling
    config |= {**changes, "dtype": dtype, "torch_dtype": dtype}
    if quantization is not None:
        config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)


def table_notes(opened: Exportable) -> tuple[str, ...]:
    """Return a note that quantized tables are written in half precision, if there are any."""
    if not opened.tables:
        return ()
    return (f"{', '.join(opened.tables)}: written in half precision; readers of this layout do not support quantized tables.",)


def _half_table(table: QuantizedEmbedding) -> torch.Tensor:
    table.dtype = torch.float16
    return table(torch.arange(len(table.weight)))  # type: ignore[no-any-return]
