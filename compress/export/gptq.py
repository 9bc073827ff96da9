"""The GPTQ layout, version 1, which auto-gptq 0.7.1, GPTQModel (through transformers and optimum) and vLLM (not tested here) read.

Its tensors are described in `compress.layers.gptq_layout`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.common.files import write_json
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
from compress.export.reader import Reader, in_sentence_transformers
from compress.layers.gptq_layout import BITS, RUN, gptq_tensors
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.models.architectures import is_in_block
from compress.models.folder import ModelFolder

LAYOUT = "gptq"
NUMBERS = frozenset({Numbers.INTEGER})
# GPTQModel's kernels compute in half precision only; rounding every layer's output costs this much.
HALF_COSINE = 0.9995
# Lists of blocks that readers find by themselves; the config names any other.
FOUND = ("layers", "h", "decoder.layers")


def write(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder.

    Raises:
        UserError: the layout cannot store a layer; see `check` and `quantization_config`.
    """
    opened = open_for_export(source, LAYOUT, NUMBERS)
    quantization = quantization_config(opened)
    write_weights(opened, folder, gptq_tensors, opened.prefix)
    # auto-gptq builds a causal language model, whose head an embedder lacks; a tied head would overwrite the embedding table.
    write_config(opened, folder, quantization, "float16", {"tie_word_embeddings": False})
    write_json(folder / "quantize_config.json", quantization)
    write_tokenizer(opened, folder)
    write_modules(opened, folder)
    notes = [*table_notes(opened), *_notes(list(opened.linears.values()))]
    if "modules_in_block_to_quantize" in quantization:
        notes.append("Some layers of a block are in half precision: optimum and vLLM load that; auto-gptq expects all quantized.")
    # float16, as stored; by default GPTQModel's kernel for CPUs computes in bfloat16.
    options = f'"dtype": "float16", "quantization_config": GPTQConfig(bits={quantization["bits"]}, backend="torch")'
    example = in_sentence_transformers("from transformers import GPTQConfig\n", options)
    return Reader(
        "sentence-transformers", ("sentence-transformers", "optimum", "gptqmodel"), example, lowest=HALF_COSINE, notes=tuple(notes)
    )


def _notes(layers: list[QuantizedLayer]) -> list[str]:
    """Return notes on how current readers treat such layers."""
    notes = ['On a CPU, GPTQModel chooses a kernel that computes in bfloat16; `backend="torch"` computes in float16.']
    if any(layer.group_size is None for layer in layers):
        notes.append("Scales are float32, as in the variant; readers round them to their own dtype.")
    if not all(layer.symmetric for layer in layers):
        notes.append(
            "Asymmetric: `GPTQModel.load` accepts such files only from GPTQModel itself; through transformers it reads these too."
        )
        notes.append("GPTQModel 7.6 ignores zeros in its CPU kernel `torch_fused`, which it does not choose by default.")
    return notes


def quantization_config(opened: Exportable) -> dict[str, Any]:
    """Return the content of `quantize_config.json`, which is also the `quantization_config` of `config.json`.

    Raises:
        UserError: see `check`; layers of several precisions; a layer that is quantized in some blocks but not in others.
    """
    first_name, first = next(iter(opened.linears.items()))
    for name, layer in opened.linears.items():
        check(name, layer, *opened.shape(name))
        if layer != first:
            raise UserError(
                f"{name}: is {_described(layer)} where {first_name} is {_described(first)}; a {LAYOUT} file has a single precision",
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
    """Check that the layout can store a layer.

    Raises:
        UserError: it cannot, because of the kind of numbers, quantized activations, bits or widths.
    """
    check_numbers(name, layer, LAYOUT, NUMBERS)
    if layer.activations is not ActivationScheme.NONE:
        raise refusal(
            name,
            LAYOUT,
            f"are used with {layer.activations} activations, and it stores no activation scheme",
            "export as compressed-tensors, or make a variant with `activations: none`",
        )
    if layer.bits not in BITS:
        raise refusal(name, LAYOUT, f"have {layer.bits} bits", f"use one of {', '.join(map(str, BITS))}")
    for what, width in (("inputs", inputs), ("outputs", outputs)):
        if width % RUN:
            raise refusal(
                name, LAYOUT, f"have {width} {what}, not a multiple of {RUN}", "skip the layer, or export as compressed-tensors"
            )
    if layer.group_size and inputs % layer.group_size:
        raise refusal(
            name, LAYOUT, f"have {inputs} inputs, not a multiple of the group size {layer.group_size}", "choose another group_size"
        )


def _described(layer: QuantizedLayer) -> str:
    return layer.name + ("" if layer.symmetric else " with zeros")


def _chosen(opened: Exportable) -> list[str] | None:
    """Return the names of quantized layers, relative to the block; None where all linear layers of the blocks are quantized.

    Raises:
        UserError: readers match the ends of names, and would take another layer for a quantized one.
    """
    left = [name for name in opened.plain if is_in_block(name)]
    if not left:
        return None
    chosen = sorted({name.removeprefix(f"{opened.blocks}.").partition(".")[2] for name in opened.linears})
    taken = next((name for name in left if name.endswith(tuple(chosen))), None)
    if taken is not None:
        raise UserError(
            f"{taken}: is not quantized, and a {LAYOUT} file cannot distinguish it from quantized layers of the same name",
            "skip such layers in all blocks or in none, or export as compressed-tensors",
        )
    return chosen
