"""A floating-point variant of NV-Embed as a checkpoint in the published layout, which further recipes can start from."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.common.errors import UserError
from compress.common.files import write_json
from compress.common.inputs import own_file
from compress.export.base import Exportable, half_values, refusal, write_weights
from compress.export.reader import OURS, Reader
from compress.models.folder import ModelFolder
from compress.models.opened import empty_model
from compress.models.text.nv_embed import MODEL_TYPE

LAYOUT = "nv-embed"
EXAMPLE = """\
import compress

model = compress.load(".")  # the folder of this file

def embed(texts, prompt=""):
    return model.encode(texts, prompt)
"""


def write(source: ModelFolder, folder: Path) -> Reader:
    """Write a variant into an empty folder: the published keys in half precision, config, tokenizer and maximum length.

    Raises:
        UserError: the variant has another architecture, a folded head, quantized weights, or blocks without some part.
    """
    if source.config.get("model_type") != MODEL_TYPE:
        raise UserError(f"{source.name}: is not an NV-Embed", "export other models as sentence-transformers")
    info = source.compressed
    if info.quantized:
        raise refusal(next(iter(info.quantized)), LAYOUT, "are quantized", "use the variant as it is (compress encode)")
    if info.folded or info.heads is not None or info.blocks or info.dropped:
        lacks = "blocks of different widths" if info.blocks else "blocks that lack heads or a sublayer"
        lacks = "a folded head" if info.folded else lacks
        raise UserError(
            f"{source.name}: cannot be written as {LAYOUT}: it has {lacks}, which the published keys cannot describe",
            "`fold: false` in the recipe keeps the head as it is" if info.folded else "use the variant as it is (compress encode)",
        )
    if info.spec.rotated:
        raise UserError(
            f"{source.name}: cannot be written as {LAYOUT}: its head is given hidden states that are rotated back",
            "onnx and openvino store it; or rotate with `stream: false`",
        )
    if info.spec.modules:
        raise UserError(
            f"{source.name}: cannot be written as {LAYOUT}: it has a {info.spec.modules[-1].kind} module after its own head",
            "onnx and openvino store it",
        )
    write_weights(Exportable(info, source, empty_model(source), {}, [], [], "", ""), folder, half_values)
    write_json(folder / "config.json", source.config)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": info.max_length, "do_lower_case": False})
    shutil.copyfile(own_file(source.path, source.path / "tokenizer.json"), folder / "tokenizer.json")
    return Reader(OURS, (OURS,), EXAMPLE)
