"""An NV-Embed with all its weights in floating point as a checkpoint in the published layout: a model to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError
from compress.export.checkpoint import Opened, refusal, write_json, write_weights
from compress.export.sentence_transformers import no_integers
from compress.export.text import card
from compress.loading import Source
from compress.models.checkpoint import write_text_atomic
from compress.models.nv_embed import is_nv_embed
from compress.models.spec import read_json
from compress.models.variant import VariantInfo
from compress.runtimes.torch_runtime import empty_model

if TYPE_CHECKING:
    from compress.export import Say

LAYOUT = "nv-embed"
LOADING = """\
    import compress
    vectors = compress.load("FOLDER").encode(["any", "texts"], prompt="Instruct: ...\\nQuery: ")
"""


def write(source: Source, folder: Path, say: Say) -> None:
    """Write a variant into an empty folder: the published keys, in half precision, config, tokenizer and longest input.

    Raises:
        UserError: another architecture, a folded head, integers, or blocks that lack a part.
    """
    if not is_nv_embed(source.folder):
        raise UserError(f"{source.name}: is no NV-Embed", "sentence-transformers is the layout of other models")
    info = VariantInfo.read(source.folder)
    if info.quantized:
        raise refusal(next(iter(info.quantized)), LAYOUT, "are quantized", "use the variant as it is (compress encode)")
    if info.folded or info.heads is not None or info.dropped:
        lacks = "a folded head" if info.folded else "blocks that lack heads or a sublayer"
        raise UserError(
            f"{source.name}: cannot be written as {LAYOUT}: it has {lacks}, which the published keys cannot say",
            "`fold: false` in the recipe leaves the head alone" if info.folded else "use the variant as it is (compress encode)",
        )
    write_weights(Opened(info, source.folder, empty_model(source.folder), {}, [], [], "", ""), folder, no_integers)
    write_json(folder / "config.json", read_json(source.folder / "config.json"))
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": info.max_length, "do_lower_case": False})
    shutil.copy(source.folder / "tokenizer.json", folder / "tokenizer.json")
    write_text_atomic(folder / "README.md", card(info, LOADING, (), library="compress-embedders"))
