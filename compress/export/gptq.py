"""The GPTQ layout, version 1, as auto-gptq 0.7.1 reads it, GPTQModel through transformers and optimum, and vLLM (not tried here).

Each linear layer is `qweight` int32 [in x bits / 32, out], packed along the inputs; `qzeros` int32 [groups, out x bits / 32], zeros
less one, packed along the outputs; `scales` [groups, out]; `g_idx` int32 [in], the group of each input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.common.errors import UserError
from compress.common.files import write_json
from compress.export.base import (
    Exportable,
    check_numbers,
    open_for_export,
    refusal,
    table_notes,
    words,
    write_config,
    write_weights,
)
from compress.export.loader_files import write_modules, write_tokenizer
from compress.export.reader import Reader, in_sentence_transformers
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.models.architectures import is_in_block
from compress.models.source import Source

LAYOUT = "gptq"
NUMBERS = frozenset({Numbers.INTEGER})
BITS = (2, 3, 4, 8)
# auto-gptq makes room for whole runs of 32 values along the inputs and along the outputs.
RUN = 32
# GPTQModel has kernels for half precision alone: that is what rounding every layer's output to it comes to.
HALF_COSINE = 0.9995
# Lists of blocks that readers find by themselves, in any class of a model; another is named to them.
FOUND = ("layers", "h", "decoder.layers")


def write(source: Source, folder: Path) -> Reader:
    """Write a variant into an empty folder.

    Raises:
        UserError: the layout cannot hold a layer; see `check` and `quantization_config`.
    """
    opened = open_for_export(source, LAYOUT, NUMBERS)
    quantization = quantization_config(opened)
    write_weights(opened, folder, tensors_of, opened.prefix)
    # auto-gptq makes a causal language model, whose head an embedder lacks; tied to the table, it would overwrite the table.
    write_config(opened, folder, quantization, "float16", {"tie_word_embeddings": False})
    write_json(folder / "quantize_config.json", quantization)
    write_tokenizer(opened, folder)
    write_modules(opened, folder)
    notes = [*table_notes(opened), *_notes(list(opened.linears.values()))]
    if "modules_in_block_to_quantize" in quantization:
        notes.append("Some layers of a block are in half precision: for optimum and vLLM; auto-gptq expects all of them quantized.")
    # Float16 as it is stored; without a word GPTQModel's kernel for CPUs computes in bfloat16.
    options = f'"dtype": "float16", "quantization_config": GPTQConfig(bits={quantization["bits"]}, backend="torch")'
    example = in_sentence_transformers("from transformers import GPTQConfig\n", options)
    return Reader(
        "sentence-transformers", ("sentence-transformers", "optimum", "gptqmodel"), example, lowest=HALF_COSINE, notes=tuple(notes)
    )


def _notes(layers: list[QuantizedLayer]) -> list[str]:
    """Say what readers of today make of such layers."""
    notes = ['On a CPU GPTQModel chooses a kernel that computes in bfloat16; `backend="torch"` takes float16.']
    if any(layer.group_size is None for layer in layers):
        notes.append("Scales are float32, as in the variant; readers round them to their own dtype.")
    if not all(layer.symmetric for layer in layers):
        notes.append(
            "Zeros of their own: `GPTQModel.load` takes such files from itself alone; through transformers it reads these too."
        )
        notes.append("GPTQModel 7.6 leaves zeros out in its CPU kernel `torch_fused`, which is not the one it chooses.")
    return notes


def quantization_config(opened: Exportable) -> dict[str, Any]:
    """Return what `quantize_config.json`, and `quantization_config` in `config.json`, say.

    Raises:
        UserError: see `check`; layers of several precisions; a layer in some blocks quantized and in others not.
    """
    first_name, first = next(iter(opened.linears.items()))
    for name, layer in opened.linears.items():
        check(name, layer, *opened.shape(name))
        if layer != first:
            raise UserError(
                f"{name}: is {_described(layer)} where {first_name} is {_described(first)}; a {LAYOUT} file has one precision",
                "leave `overrides` out, or export as compressed-tensors",
            )
    config = {
        "quant_method": LAYOUT,
        "checkpoint_format": LAYOUT,
        "bits": first.bits,
        "group_size": first.group_size or -1,
        "sym": first.symmetric,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        "model_file_base_name": "model",
    }
    if opened.blocks not in FOUND:
        config["block_name_to_quantize"] = opened.blocks
    chosen = _chosen(opened)
    if chosen is not None:
        config["modules_in_block_to_quantize"] = [chosen]
    return config


def check(name: str, layer: QuantizedLayer, outputs: int, inputs: int) -> None:
    """See that the layout can hold a layer.

    Raises:
        UserError: it cannot: quantized activations, FP8, bits, widths.
    """
    check_numbers(name, layer, LAYOUT, NUMBERS)
    if layer.activations is not ActivationScheme.NONE:
        raise refusal(
            name,
            LAYOUT,
            f"go with {layer.activations} activations, and it stores no activation scheme",
            "export as compressed-tensors, or make a variant with `activations: none`",
        )
    if layer.bits not in BITS:
        raise refusal(name, LAYOUT, f"have {layer.bits} bits", f"use one of {', '.join(map(str, BITS))}")
    for what, width in (("inputs", inputs), ("outputs", outputs)):
        if width % RUN:
            raise refusal(
                name, LAYOUT, f"have {width} {what}, no multiple of {RUN}", "skip the layer, or export as compressed-tensors"
            )
    if layer.group_size and inputs % layer.group_size:
        raise refusal(
            name, LAYOUT, f"have {inputs} inputs, no multiple of the group of {layer.group_size}", "choose another group_size"
        )


def tensors_of(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return a layer's tensors; see the module. Our zeros are at least 1, so that one less never wraps around."""
    bits = layer.layer.bits
    group = layer.layer.group_size or layer.in_features
    return {
        "qweight": words(layer.integers(), bits).t(),
        "qzeros": words((layer.zeros() - 1).t().contiguous(), bits),
        "scales": layer.weight_scale.view(layer.out_features, -1).t(),
        "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // group,
    }


def _described(layer: QuantizedLayer) -> str:
    return layer.name + ("" if layer.symmetric else " with zeros")


def _chosen(opened: Exportable) -> list[str] | None:
    """Return the names inside a block of its quantized layers; None where all linear layers of the blocks are quantized.

    Raises:
        UserError: readers, who look at the ends of names, would take other layers for quantized ones.
    """
    left = [name for name in opened.plain if is_in_block(name)]
    if not left:
        return None
    chosen = sorted({name.removeprefix(f"{opened.blocks}.").partition(".")[2] for name in opened.linears})
    taken = next((name for name in left if name.endswith(tuple(chosen))), None)
    if taken is not None:
        raise UserError(
            f"{taken}: is not quantized, and a {LAYOUT} file cannot tell it from others of its name that are",
            "skip such layers in all blocks or in none, or export as compressed-tensors",
        )
    return chosen
