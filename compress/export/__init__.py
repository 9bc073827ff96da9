"""A finished variant in the layouts of other libraries: one file a layout, named in this table, imported when it is asked for."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

from compress.errors import UserError, nearest
from compress.loading import Source, find

FORMATS = {
    "sentence-transformers": "compress.export.sentence_transformers:write",
    "compressed-tensors": "compress.export.compressed_tensors:write",
    "onnx": "compress.export.graphs:write_onnx",
    "openvino": "compress.export.graphs:write_openvino",
    "nv-embed": "compress.export.nv_embed:write",
    "gptq": "compress.export.gptq:write",
}

Say = Callable[[str], None]
Writer = Callable[[Source, Path, Say], None]
"""Writes a variant into an empty folder, saying what a user should know of it; raises UserError where the layout cannot hold it."""


def export(source: Path, format: str, target: Path, say: Say = lambda _: None) -> Path:
    """Write a variant in the layout of another library; integers and scales are carried over as they are.

    Args:
        source: folder of a run that kept its variant, or of a variant.
        format: one of `FORMATS`.
        target: the folder to be written; it appears when it is whole.
        say: told what a user should know of the export.

    Returns:
        `target`.

    Raises:
        UserError: the format is not known, the source is no variant, the target is there already, or the layout cannot hold the
            variant; names the layer and why.
    """
    if format not in FORMATS:
        raise UserError(f"export format {format!r} is not known", nearest(format, FORMATS))
    found = find(str(source))
    if not found.is_variant:
        raise UserError(f"{source}: holds no variant", "compress run RECIPE writes one; give the folder of the run")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already", "give another folder, or delete this one")
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        writer(format)(found, folder, say)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def writer(format: str) -> Writer:
    """Import what writes a format."""
    module, _, attribute = FORMATS[format].partition(":")
    found: Writer = getattr(importlib.import_module(module), attribute)
    return found
