"""A finished variant in the layouts of other libraries. Light to import: each layout is a file, imported when it is asked for."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compress.common.errors import UserError, nearest
from compress.common.files import filling, is_taken, write_text_atomic
from compress.common.lazy import attribute

if TYPE_CHECKING:
    from compress.export.reader import Reader
    from compress.models.files.variant import VariantInfo
    from compress.models.folder import ModelFolder

FORMATS: Mapping[str, str] = {
    "transformers": "compress.export.dense:write_transformers",
    "sentence-transformers": "compress.export.dense:write_sentence_transformers",
    "model2vec": "compress.export.static_table:write_model2vec",
    "nv-embed": "compress.export.nv_embed:write",
    "onnx": "compress.export.graphs:write_onnx",
    "openvino": "compress.export.graphs:write_openvino",
    "compressed-tensors": "compress.export.compressed_tensors:write",
    "gptq": "compress.export.gptq:write",
    "gguf": "compress.export.gguf:write",
}
"""The export formats and the functions that write them, `module:function`. A new format is a row here and the file that the row
names: the recipe's `export` key, the help of `--format` and the errors follow from this table, and the `Reader` that the function
returns says which library reads the format and which packages that takes."""

VARIANT = "variant"
"""The form in which a run keeps its variant. It is no other library's, so it is written only where the variant is cut."""
Say = Callable[[str], None]
Writer = Callable[["ModelFolder", Path], "Reader"]
"""Writes a variant into an empty folder and returns what loads it; raises UserError where the layout cannot hold the variant."""


def export(
    source: Path,
    format: str,
    target: Path,
    say: Say = lambda _: None,
    *,
    licence: str | None = None,
    python: Path | None = None,
    check: bool = True,
    depth: int | None = None,
) -> Path:
    """Write a variant in the layout of another library; integers and scales are copied as they are.

    Args:
        source: folder of a run that kept its variant, or of a variant.
        format: one of `FORMATS`; with `depth` also `variant`.
        target: the folder to write; it appears once it is complete.
        say: receives what a user should know about the export.
        licence: licence for the card, where the model's own files name none.
        python: interpreter that has the library and reads the export back; None: this one.
        check: whether the export is read back.
        depth: number of the variant's first blocks that are written, where it was trained to be cut; None: all of them.

    Returns:
        `target`.

    Raises:
        UserError: the format is not known, the source is not a variant or was not trained to be cut to this depth, the target
            already exists, the layout cannot hold the variant (names the layer and the reason), the library's vectors differ from
            the variant's, or `licence` is not the model's.
    """
    if format == VARIANT and depth is None:
        raise UserError("export format 'variant' is for a variant that is cut", "give the number of blocks with --depth")
    if format not in (*FORMATS, VARIANT):
        raise UserError(f"export format {format!r} is not known", nearest(format, FORMATS))
    found, info = _variant(source)
    if licence is not None and info.licence not in (None, licence):
        raise UserError(f"{source}: {info.base} is under {info.licence}, which also holds for its variants; not {licence}")
    if is_taken(target):
        raise UserError(f"{target}: already exists", "choose another folder, or delete this one")
    if depth is not None:
        return _export_cut(found, depth, format, target, partial(_write, say=say, licence=licence, python=python, check=check))
    with filling(target) as folder:
        _write(found, format, folder, say, licence=licence, python=python, check=check)
    return target


def _write(
    source: ModelFolder, format: str, folder: Path, say: Say, *, licence: str | None, python: Path | None, check: bool
) -> None:
    """Write a variant into an empty folder in a layout of the table; see `export`."""
    info, reader = source.compressed, writer(format)(source, folder)
    for note in reader.notes:
        say(note)
    say(_checked(source, info.model_copy(update={"licence": info.licence or licence}), reader, folder, python, check))


def _export_cut(
    source: ModelFolder, depth: int, format: str, target: Path, write: Callable[[ModelFolder, str, Path], None]
) -> Path:
    """Write a variant cut to its first blocks: as a variant, or with `write` in a layout of the table."""
    from compress.models.cut import cut

    with filling(target) as folder:
        if format == VARIANT:
            cut(source, depth, folder)
            return target
        # Next to the export, on the disk that the user named for it.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".cut-") as part:
            between = folder / "layout"
            between.mkdir()
            write(cut(source, depth, Path(part)), format, between)
        for path in between.iterdir():
            path.rename(folder / path.name)
        between.rmdir()
    return target


def _variant(source: Path) -> tuple[ModelFolder, VariantInfo]:
    """Find a variant.

    Raises:
        UserError: the source is not a variant.
    """
    from compress.models.source import find

    found = find(str(source))
    return found, found.compressed


def _checked(source: ModelFolder, info: VariantInfo, reader: Reader, folder: Path, python: Path | None, check: bool) -> str:
    """Read an export back, write its example and its card, and return what to tell the user."""
    from compress.export.card import CARD_FILE, EXAMPLE_FILE, card, example, record_of
    from compress.export.reader import Checked, read_back, usual_prompt

    checked = read_back(source, folder, reader, python or Path(sys.executable)) if check else Checked("Not read back.")
    prompt = usual_prompt(source)
    write_text_atomic(folder / EXAMPLE_FILE, example(reader, prompt))
    write_text_atomic(folder / CARD_FILE, card(info, reader, prompt, checked.outcome, record_of(source.path), folder))
    return f"{checked.outcome} {checked.advice}".strip()


def licence_of(source: Path) -> str | None:
    """Return the licence of a variant's model; None where its files name none.

    Raises:
        UserError: there is no such source.
    """
    from compress.models.source import find

    found = find(str(source))
    return found.variant.licence if found.variant else None


def writer(format: str) -> Writer:
    """Import the function that writes a format of the table.

    Raises:
        KeyError: there is no such format.
    """
    found: Writer = attribute(FORMATS[format])
    return found
