"""A variant without integers as an ordinary smaller model of its architecture, for sentence-transformers and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.export.checkpoint import open_variant, table_note, write_config, write_weights
from compress.export.text import write_text_side
from compress.loading import Source

if TYPE_CHECKING:
    from compress.export import Say

LAYOUT = "sentence-transformers"
LOADING = """\
pip install sentence-transformers

    from sentence_transformers import SentenceTransformer
    vectors = SentenceTransformer("FOLDER").encode(["any", "texts"])
"""


def write(source: Source, folder: Path, say: Say) -> None:
    """Write a variant into an empty folder, its weights in half precision, pruned ones among them as zeros.

    Raises:
        UserError: a linear layer is quantized, or the architecture's config cannot describe the variant.
    """
    opened = open_variant(source, LAYOUT, integers=False)
    notes = table_note(opened)
    for note in notes:
        say(note)
    write_weights(opened, folder, no_integers)
    write_config(opened, folder, None, "float16", {})
    write_text_side(opened, folder, LOADING, notes)


def no_integers(layer: Any) -> dict[str, torch.Tensor]:
    """Stand in for what converts quantized layers, where none can be."""
    raise AssertionError(f"{type(layer).__name__} in a variant without quantized layers")
