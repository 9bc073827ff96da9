"""A variant as a half-precision model of its architecture, for sentence-transformers or for plain transformers."""

from __future__ import annotations

from pathlib import Path

from compress.export import static_table
from compress.export.base import Exportable, half_values, open_for_export, table_notes, write_config, write_weights
from compress.export.loader_files import write_modules, write_tokenizer
from compress.export.reader import Reader, in_sentence_transformers, in_transformers
from compress.models.folder import ModelFolder

SENTENCE_TRANSFORMERS, TRANSFORMERS = "sentence-transformers", "transformers"


def write_sentence_transformers(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder: weights, tokenizer, and the modules for pooling and normalisation.

    Pruned weights are written as zeros, integers as dequantized values.

    Raises:
        UserError: the architecture's config cannot describe the variant.
    """
    if source.is_static:
        return static_table.write_sentence_transformers(source, folder)
    opened = _write(source, folder, SENTENCE_TRANSFORMERS)
    write_modules(opened, folder)
    return Reader(SENTENCE_TRANSFORMERS, (SENTENCE_TRANSFORMERS,), in_sentence_transformers(), notes=_notes(opened))


def write_transformers(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder: only weights and tokenizer. The card's example does the pooling.

    Raises:
        UserError: the architecture's config cannot describe the variant.
    """
    opened = _write(source, folder, TRANSFORMERS)
    return Reader(TRANSFORMERS, (TRANSFORMERS, "torch"), in_transformers(opened.info.spec), notes=_notes(opened))


def _write(source: ModelFolder, folder: Path, layout: str) -> Exportable:
    opened = open_for_export(source, layout)
    write_weights(opened, folder, half_values)
    write_config(opened, folder, None, "float16", {})
    write_tokenizer(opened, folder)
    return opened


def _notes(opened: Exportable) -> tuple[str, ...]:
    if not opened.linears:
        return table_notes(opened)
    return (
        f"{len(opened.linears)} linear layers of {opened.info.weights}: dequantized to half precision, so the file is as large as"
        " the original model's; activations are not quantized.",
        *table_notes(opened),
    )
