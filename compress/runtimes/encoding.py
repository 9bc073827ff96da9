"""Texts from a file to vectors in a file, in the memory of one chunk of texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from compress.common.errors import UserError
from compress.common.files import replacing
from compress.data.texts import is_hub, iterate_texts, read_texts
from compress.models.embedder import checked_chunks
from compress.models.text.spec import UnknownTask


@dataclass(frozen=True)
class EncodeOptions:
    """How the texts of a file are embedded."""

    prompt: str | None = None
    """The string to put before every text; None: the task's, or the model's default."""
    task: str | None = None
    """`query` or `document`: what the texts are embedded for."""
    runtime: str | None = None
    """As for `compress.load`, like `device` and `stream`."""
    device: str | None = None
    stream: bool = False


def encode_file(model: str, texts: Path, target: Path, options: EncodeOptions | None = None) -> tuple[int, int]:
    """Embed the texts of a file and write the vectors as they are made: float32 [texts, dimension], `.npy`.

    The file is read once before the model is opened, so that a fault in its last line is not found after hours. The vectors are
    those of one call of `encode` with all texts, and so are the file's bytes those of `numpy.save`.

    Args:
        model: as for `compress.load`.
        texts: the file, as `read_texts` reads it.
        target: the file of the vectors; it appears once it is complete.
        options: prompt, task, runtime and the like.

    Returns:
        The number of vectors and their dimension.

    Raises:
        UserError: the texts cannot be read or embedded, the model cannot be opened, or the target cannot be written.
    """
    from compress.runtimes.loading import load

    options = options or EncodeOptions()
    listed = read_texts(texts) if is_hub(texts) else None
    expected = sum(map(len, _chunks(texts, listed)))
    embedder = load(model, runtime=options.runtime, device=options.device, stream=options.stream)
    written = 0
    with replacing(target) as temporary, temporary.open("wb") as file:
        _write_header(file, expected, embedder.dimension)
        for chunk in _chunks(texts, listed):
            try:
                vectors = embedder.encode(chunk, options.prompt, task=options.task)
            except UnknownTask:
                raise
            except (ValueError, FloatingPointError) as error:  # a text or a prompt that the model cannot take; see `encode`
                raise UserError(f"{texts}: cannot be embedded: {error}") from error
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).data)
            written += len(vectors)
        if written != expected:
            raise UserError(f"{texts}: had {expected} texts at first, and {written} later", "do not change it meanwhile")
    return written, embedder.dimension


def _chunks(texts: Path, listed: list[str] | None) -> Iterator[list[str]]:
    """Yield the texts, of a file or listed, in chunks.

    Raises:
        UserError: a text is none.
    """
    try:
        yield from checked_chunks(iterate_texts(texts) if listed is None else listed)
    except TypeError as error:
        raise UserError(f"{texts}: {error}") from error


def _write_header(file: IO[bytes], rows: int, dimension: int) -> None:
    """Write the header of a `.npy` file of float32 [rows, dimension]."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(file, header)
