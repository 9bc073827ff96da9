"""The layout of the compressed-tensors package, which transformers, sentence-transformers and vLLM load (vLLM is not tested here).

Five formats, chosen per layer: packed integer weights only (`pack-quantized`), int8 weights with int8 activations
(`int-quantized`), FP8 weights (`float-quantized`), MXFP4 and NVFP4 weights only (`mxfp4-pack-quantized`, `nvfp4-pack-quantized`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from compress.export.base import (
    Exportable,
    check_numbers,
    open_for_export,
    refusal,
    table_notes,
    write_config,
    write_weights,
)
from compress.export.loader_files import write_modules, write_tokenizer
from compress.export.reader import Reader, in_sentence_transformers, in_transformers
from compress.layers.float4_linear import Float4Linear
from compress.layers.float8_linear import Float8Linear
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.layers.torch_packing import words
from compress.models.folder import ModelFolder

LAYOUT = "compressed-tensors"
# Release of compressed-tensors that defines this layout.
VERSION = "0.20.0"
NUMBERS = frozenset({Numbers.INTEGER, Numbers.FLOAT8, Numbers.MXFP4, Numbers.NVFP4})
# How the layout describes weights in four-bit floating point: format, strategy and dtype of the scales.
FLOAT4 = {
    Numbers.MXFP4: ("mxfp4-pack-quantized", "group", "torch.uint8"),
    Numbers.NVFP4: ("nvfp4-pack-quantized", "tensor_group", "torch.float8_e4m3fn"),
}
# How the layout describes activations of integer layers; a scheme that is not here is refused.
INTEGER_ACTIVATIONS: Mapping[ActivationScheme, Mapping[str, Any]] = {
    ActivationScheme.STATIC_PER_TENSOR: {"strategy": "tensor", "dynamic": False},
    ActivationScheme.DYNAMIC_PER_TOKEN: {"strategy": "token", "dynamic": True},
}
# And of FP8 layers.
FLOAT8_ACTIVATIONS: Mapping[ActivationScheme, Mapping[str, Any]] = {
    ActivationScheme.DYNAMIC_PER_TOKEN: {"strategy": "token", "dynamic": True}
}
# Bits that divide a 32-bit word, which every release packs in the same way; others were packed with gaps up to release 0.17.
EVEN_BITS = (2, 4, 8)

DEQUANTIZE = "from transformers import CompressedTensorsConfig\n"
NO_ROUNDING = """\
for module in model.modules():
    module.quantization_enabled = False  # of activations, whose range it finds in a different way than the variant
"""
OPTIONS = '"quantization_config": CompressedTensorsConfig(dequantize=True)'


def write(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder.

    Raises:
        UserError: the layout cannot store a layer; see `scheme_of`.
    """
    opened = open_for_export(source, LAYOUT, NUMBERS)
    quantization = quantization_config(opened)
    write_weights(opened, folder, tensors_of)
    config = opened.folder.config
    # Scales are float16 or float32; bfloat16 would round them.
    single = str(config.get("dtype") or config.get("torch_dtype") or "float32") == "float32"
    write_config(opened, folder, quantization, "float32" if single else "float16", {})
    write_tokenizer(opened, folder)
    write_modules(opened, folder)
    mixed = len(quantization["config_groups"]) > 1
    rounds = opened.info.activations != ActivationScheme.NONE
    notes = (*table_notes(opened), *_notes(opened.linears.values(), mixed, rounds))
    if mixed:  # transformers opens these, sentence-transformers 6.2 does not
        example = in_transformers(opened.info.spec, NO_ROUNDING if rounds else "")
        return Reader("transformers", ("transformers", "torch", LAYOUT), example, notes=notes)
    example = in_sentence_transformers(DEQUANTIZE, OPTIONS)
    return Reader("sentence-transformers", ("sentence-transformers", LAYOUT), example, notes=notes)


def _notes(layers: Iterable[QuantizedLayer], mixed: bool, rounds: bool) -> list[str]:
    """Return notes on what current readers do not support for such layers."""
    layers = list(layers)
    notes = []
    odd = sorted({layer.bits for layer in layers if layer.activations is ActivationScheme.NONE} - set(EVEN_BITS))
    if odd:
        bits = " and ".join(map(str, odd))
        notes.append(f"{bits} bits: packed without gaps, as in compressed-tensors 0.19 and later.")
    if any(layer.numbers is Numbers.NVFP4 for layer in layers):
        notes.append("NVFP4: compressed-tensors 0.20 unpacks weights to bfloat16, which rounds them once more.")
    zeros = not all(layer.symmetric for layer in layers)
    if mixed and zeros:
        notes.append(
            "Several precisions, some asymmetric: transformers 5.23 loads such files neither with nor without `dequantize=True`."
        )
    elif mixed:
        notes.append(
            "Several precisions: with `dequantize=True`, transformers 5.23 applies the first layer's to all; leave it out."
        )
    elif zeros:
        notes.append("Asymmetric: transformers 5.23 loads such files, its own too, only with `dequantize=True`.")
    if rounds:
        notes.append("Activations: `dequantize=True` leaves them in floating point; readers with 8-bit products quantize them.")
    return notes


def quantization_config(opened: Exportable) -> dict[str, Any]:
    """Return the `quantization_config` of `config.json`: one group per precision.

    Raises:
        UserError: see `scheme_of`.
    """
    by_layer: dict[QuantizedLayer, list[str]] = {}
    for name, layer in opened.linears.items():
        scheme_of(name, layer, opened.shape(name)[1])
        by_layer.setdefault(layer, []).append(name)
    groups = {}
    for index, (layer, names) in enumerate(by_layer.items()):
        targets = ["Linear"] if len(by_layer) == 1 else list(exactly(names))
        groups[f"group_{index}"] = {"targets": targets, **scheme_of(names[0], layer, opened.shape(names[0])[1])}
    formats = {str(group["format"]) for group in groups.values()}
    return {
        "quant_method": LAYOUT,
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(exactly(opened.plain)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def exactly(names: Iterable[str]) -> Iterable[str]:
    """Return patterns that match single modules, with any prefix that a reader adds: none in transformers, `model.` in vLLM."""
    return (rf"re:(.*\.)?{re.escape(name)}$" for name in names)


def scheme_of(name: str, layer: QuantizedLayer, inputs: int) -> dict[str, Any]:
    """Describe a layer's numbers as a group of the config, without its targets.

    Raises:
        UserError: the layout does not store the kind of numbers; the inputs are not a multiple of the group size; quantized
            activations with weights of other than 8 bits; an activation scheme that no reader runs.
    """
    check_numbers(name, layer, LAYOUT, NUMBERS)
    if layer.numbers is Numbers.FLOAT8:
        weights = _arguments(8, "float", strategy="channel")
        return _scheme("float-quantized", weights, _activations(name, layer, "float", FLOAT8_ACTIVATIONS))
    if layer.group_size and inputs % layer.group_size:
        hints = {Numbers.MXFP4: "choose `format: nvfp4` with groups of 16, or `skip` the layer", Numbers.NVFP4: "`skip` the layer"}
        hint = hints.get(layer.numbers, "choose another group_size")
        raise refusal(name, LAYOUT, f"have {inputs} inputs, not a multiple of the group size {layer.group_size}", hint)
    if layer.numbers in FLOAT4:
        format, strategy, dtype = FLOAT4[layer.numbers]
        weights = _arguments(layer.bits, "float", strategy=strategy, group_size=layer.group_size)
        return _scheme(format, weights | {"scale_dtype": dtype}, None)
    weights = _arguments(
        layer.bits,
        "int",
        strategy="group" if layer.group_size else "channel",
        group_size=layer.group_size,
        symmetric=layer.symmetric,
    )
    if layer.activations is ActivationScheme.NONE:
        return _scheme("pack-quantized", weights, None)
    if layer.bits != 8:
        raise refusal(
            name,
            LAYOUT,
            f"have {layer.bits} bits and quantized activations",
            "use 8 bits, or keep activations in floating point (`activations: none`)",
        )
    return _scheme("int-quantized", weights, _activations(name, layer, "int", INTEGER_ACTIVATIONS))


def _activations(
    name: str, layer: QuantizedLayer, kind: str, known: Mapping[ActivationScheme, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Describe a layer's activations; None where they stay in floating point.

    Raises:
        UserError: the scheme is not one of those that readers of the layout run.
    """
    if layer.activations is ActivationScheme.NONE:
        return None
    if layer.activations not in known:
        raise refusal(
            name, LAYOUT, f"are used with {layer.activations} activations, which no reader runs", f"use {' or '.join(known)}"
        )
    return _arguments(8, kind, **known[layer.activations])


def tensors_of(layer: QuantizedLinear | Float8Linear | Float4Linear) -> dict[str, torch.Tensor]:
    """Return a layer's tensors; scales are [out, 1] or [out, groups] in the variant's dtype.

    Packed integers are unsigned, with zero at the middle of their range, as in the variant. Rows of weights are padded to whole
    words; zeros are packed along the outputs. Four-bit floating point is stored as in the variant.
    """
    if isinstance(layer, Float4Linear):
        assert layer.weight is not None, "the layer is not unpacked"
        tensors = {"weight_packed": layer.weight, "weight_scale": layer.weight_scale}
        if layer.weight_global_scale is not None:
            tensors["weight_global_scale"] = layer.weight_global_scale.view(1)
        return tensors
    scale = layer.weight_scale.view(layer.out_features, -1)
    if isinstance(layer, Float8Linear):
        return {"weight": layer.weight, "weight_scale": scale}
    if layer.scheme is not ActivationScheme.NONE:
        assert layer.weight is not None, "the layer is not packed for a kernel"  # plain int8: 8 bits, symmetric
        tensors = {"weight": layer.weight, "weight_scale": scale}
        if layer.input_scale is not None:
            tensors["input_scale"] = layer.input_scale.view(1)
        return tensors
    bits = layer.layer.bits
    tensors = {
        "weight_packed": words(layer.integers(), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([layer.out_features, layer.in_features]),
    }
    if not layer.layer.symmetric:
        tensors["weight_zero_point"] = words(layer.zeros().t().contiguous(), bits).t()
    return tensors


def _arguments(
    bits: int, kind: str, *, strategy: str, group_size: int | None = None, symmetric: bool = True, dynamic: bool = False
) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": kind,
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def _scheme(format: str, weights: dict[str, Any], activations: dict[str, Any] | None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": activations, "output_activations": None, "format": format}
