"""A finished variant in the layouts of other libraries: one file a layout, named in this table, imported when it is asked for."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from compress.common.errors import UserError, nearest
from compress.common.files import write_text_atomic
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.source import find

if TYPE_CHECKING:
    from compress.export.reader import Reader

FORMATS = {
    "transformers": "compress.export.dense:write_transformers",
    "sentence-transformers": "compress.export.dense:write_sentence_transformers",
    "compressed-tensors": "compress.export.compressed_tensors:write",
    "onnx": "compress.export.graphs:write_onnx",
    "openvino": "compress.export.graphs:write_openvino",
    "nv-embed": "compress.export.nv_embed:write",
    "gptq": "compress.export.gptq:write",
    "gguf": "compress.export.gguf:write",
}

Say = Callable[[str], None]
Writer = Callable[[ModelFolder, Path], "Reader"]
"""Writes a variant into an empty folder and says what loads it; raises UserError where the layout cannot hold it."""


def export(
    source: Path,
    format: str,
    target: Path,
    say: Say = lambda _: None,
    *,
    licence: str | None = None,
    python: Path | None = None,
    check: bool = True,
) -> Path:
    """Write a variant in the layout of another library; integers and scales are carried over as they are.

    Args:
        source: folder of a run that kept its variant, or of a variant.
        format: one of `FORMATS`.
        target: the folder to be written; it appears when it is whole.
        say: told what a user should know of the export.
        licence: what the card names, where the model's own files name none.
        python: interpreter in which the library is installed, which reads back what was written; None: this one.
        check: whether it is read back.

    Returns:
        `target`.

    Raises:
        UserError: the format is not known, the source is no variant, the target is there already, the layout cannot hold it (names
            the layer and why), the library gives other vectors than the variant, or another licence is named than the model's.
    """
    if format not in FORMATS:
        raise UserError(f"export format {format!r} is not known", nearest(format, FORMATS))
    found = find(str(source))
    info = found.compressed
    if licence is not None and info.licence not in (None, licence):
        raise UserError(f"{source}: {info.base} is under {info.licence}, which holds for its variants; not {licence}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: is there already", "give another folder, or delete this one")
    folder = target.with_name(f".{target.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write(found, info.model_copy(update={"licence": info.licence or licence}), format, folder, say, python, check)
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def _write(source: ModelFolder, info: VariantInfo, format: str, folder: Path, say: Say, python: Path | None, check: bool) -> None:
    """Write a variant, read it back and write its card."""
    from compress.export.card import CARD_FILE, EXAMPLE_FILE, card, example, record_of
    from compress.export.reader import Checked, read_back, usual_prompt

    reader = writer(format)(source, folder)
    for note in reader.notes:
        say(note)
    checked = read_back(source, folder, reader, python or Path(sys.executable)) if check else Checked("Not read back.")
    say(f"{checked.outcome} {checked.advice}".strip())
    prompt = usual_prompt(source)
    write_text_atomic(folder / EXAMPLE_FILE, example(reader, prompt))
    write_text_atomic(folder / CARD_FILE, card(info, reader, prompt, checked.outcome, record_of(source.path), folder))


def licence_of(source: Path) -> str | None:
    """Return the licence that a variant's model is under; None where its files name none.

    Raises:
        UserError: the source is no variant.
    """
    found = find(str(source))
    return found.compressed.licence


def writer(format: str) -> Writer:
    """Import what writes a format."""
    module, _, attribute = FORMATS[format].partition(":")
    found: Writer = getattr(importlib.import_module(module), attribute)
    return found
