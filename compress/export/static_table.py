"""A static table for sentence-transformers (StaticEmbedding) and model2vec. How both take texts: `compress.models.text.static`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from compress.common.errors import UserError
from compress.common.files import write_json
from compress.export.loader_files import MODULES, sentence_transformers_files
from compress.export.reader import Reader, in_sentence_transformers
from compress.models.files.shards import write_tensors
from compress.models.files.variant import WEIGHTS_FILE
from compress.models.folder import ModelFolder
from compress.models.text.sentence_transformers import STATIC
from compress.models.text.static import MODEL2VEC, median_length
from compress.models.text.tokens import open_tokenizer, unknown_token
from compress.runtimes.numpy_runtime import IntegerRows, TokenVectors, float32, mapped, token_vectors

IN_MODEL2VEC = """\
from model2vec import StaticModel

model = StaticModel.from_pretrained(".")  # the folder of this file

def embed(texts, prompt=""):
    return model.encode([prompt + text for text in texts])
"""


def write_sentence_transformers(source: ModelFolder, folder: Path) -> Reader:
    """Write a static table into an empty folder as StaticEmbedding and the modules after it, in float32.

    sentence-transformers averages unknown tokens too. Where the variant leaves them out and scales its vectors to unit length at
    once, their row is written as zeros, which gives the same vectors.
    """
    spec, tokenizer = source.spec, open_tokenizer(source.path)
    vectors = token_vectors(source)(np.arange(source.config["vocab_size"]))
    unknown = unknown_token(tokenizer) if spec.skip_unknown else None
    if unknown is not None and spec.normalize and not spec.modules:
        vectors[unknown], unknown = 0, None
    write_tensors(folder / WEIGHTS_FILE, {"embedding.weight": torch.from_numpy(vectors)})
    shutil.copy(source.path / "tokenizer.json", folder / "tokenizer.json")
    files = sentence_transformers_files(source.compressed, source.shape.hidden_size)
    modules = [("", STATIC)]
    for entry in files.pop("modules.json")[2:]:  # in the place of Transformer and Pooling
        modules.append((entry["path"], entry["type"].rpartition(".")[2]))
    files = {name: content for name, content in files.items() if name not in ("sentence_bert_config.json", "1_Pooling/config.json")}
    files["modules.json"] = [
        {"idx": index, "name": str(index), "path": path, "type": f"{MODULES}.{kind}"} for index, (path, kind) in enumerate(modules)
    ]
    for path, _ in modules:
        (folder / path).mkdir(exist_ok=True)
    for name, content in files.items():
        write_json(folder / name, content)
    _write_modules(source, folder)
    notes = list(_half_notes(source, "float32"))
    if unknown is not None:
        notes.append(f"{_differs(tokenizer)}: the variant leaves it out, sentence-transformers counts it.")
    if spec.max_characters is not None:
        there = f"sentence-transformers only at {spec.max_length} tokens"
        notes.append(f"Texts of more than {spec.max_characters:,} characters: the variant cuts them there, {there}.")
    library = "sentence-transformers"
    return Reader(library, (library,), in_sentence_transformers(options=""), notes=tuple(notes))


def write_model2vec(source: ModelFolder, folder: Path) -> Reader:
    """Write a static table into an empty folder of model2vec's.

    Integers with one scale a row stay as they are, in int8; their scales become the factors of the tokens (`weights`). All else is
    written in half precision.

    Raises:
        UserError: the model is not a static table, or has what model2vec has not.
    """
    if not source.is_static:
        raise UserError(
            f"{source.name}: cannot be written as {MODEL2VEC}: it is not a static table", "sentence-transformers holds networks"
        )
    tokenizer = open_tokenizer(source.path)
    _check(source, tokenizer)
    spec, rows, opened = source.spec, len(tokenizer.get_vocab()), token_vectors(source)
    tensors, dtype = _tensors(opened, rows)
    write_tensors(folder / WEIGHTS_FILE, {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()})
    shutil.copy(source.path / "tokenizer.json", folder / "tokenizer.json")
    config: dict[str, Any] = {
        "model_type": MODEL2VEC,
        "architectures": ["StaticModel"],
        "tokenizer_name": source.compressed.base,
        "hidden_dim": source.shape.hidden_size,
        "normalize": spec.normalize,
        "max_length": spec.max_length,
        "embedding_dtype": dtype,
    }
    if "mapping" in tensors:
        config["vocabulary_quantization"] = len(tensors["embeddings"])
    write_json(folder / "config.json", config)
    notes = [*(_half_notes(source, "half precision") if dtype != "int8" else ()), *_text_notes(source, tokenizer)]
    return Reader(MODEL2VEC, (MODEL2VEC,), IN_MODEL2VEC, notes=tuple(notes))


def _check(source: ModelFolder, tokenizer: Tokenizer) -> None:
    """See that model2vec can do with texts and vectors what the variant does.

    Raises:
        UserError: it cannot.
    """
    spec, lacks = source.spec, None
    if spec.modules:
        lacks = f"a {spec.modules[0].kind} module after the mean"
    elif spec.dimensions is not None:
        lacks = f"only the first {spec.dimensions} dimensions (truncate_dim)"
    elif spec.max_length is not None and spec.truncation_side == "left":
        lacks = "its texts cut at the left"
    elif max(tokenizer.get_vocab().values()) + 1 != len(tokenizer.get_vocab()):
        lacks = "gaps between its tokens' numbers"
    if lacks:
        raise UserError(
            f"{source.name}: cannot be written as {MODEL2VEC}: it has {lacks}", "the layout sentence-transformers holds it"
        )


def _tensors(opened: TokenVectors, tokens: int) -> tuple[dict[str, np.ndarray], str]:
    """Return model2vec's tensors for the first tokens of a table, and the dtype of its vectors."""
    count, rows = len(opened.rows), opened.rows
    kept = np.arange(count if opened.mapping is not None else tokens)
    places = kept if opened.mapping is None else opened.mapping[:tokens]
    tensors: dict[str, np.ndarray] = {} if opened.mapping is None else {"mapping": places}
    weights = None if opened.weights is None else opened.weights[:tokens]
    if isinstance(rows, IntegerRows) and rows.layer.group_size is None:
        scale = rows.scale.astype(np.float32).reshape(-1)[places]
        tensors["embeddings"], weights = rows.integers(kept), scale if weights is None else scale * weights
    else:
        tensors["embeddings"] = rows(kept).astype(np.float16)
    if weights is not None:
        tensors["weights"] = weights
    return tensors, tensors["embeddings"].dtype.name


def _write_modules(source: ModelFolder, folder: Path) -> None:
    """Write the tensors of the modules after the mean, each in its folder, in float32."""
    for number, module in enumerate(source.spec.modules):
        prefix = f"text_head.after.{number}."
        own = {
            name.removeprefix(prefix): torch.from_numpy(float32(np.array(mapped(tensor)), tensor.info.dtype))
            for name, tensor in source.tensors.items()
            if name.startswith(prefix)
        }
        if own:
            write_tensors(folder / f"{2 + number}_{module.kind}" / WEIGHTS_FILE, own)


def _half_notes(source: ModelFolder, precision: str) -> Iterator[str]:
    for name, layer in source.compressed.quantized.items():
        yield f"{name}: {layer.name} written in {precision}, which takes more room than the variant."


def _text_notes(source: ModelFolder, tokenizer: Tokenizer) -> Iterator[str]:
    """Say for which texts model2vec gives other vectors than the variant."""
    spec = source.spec
    if not spec.skip_unknown and unknown_token(tokenizer) is not None:
        yield f"{_differs(tokenizer)}: model2vec leaves it out, the variant counts it."
    characters = None if spec.max_length is None else spec.max_length * median_length(tokenizer)
    if characters != spec.max_characters:
        before = "does not" if spec.max_characters is None else f"does at {spec.max_characters:,}"
        yield f"Texts of more than {characters:,} characters: model2vec cuts them there, the variant {before}."


def _differs(tokenizer: Tokenizer) -> str:
    unknown = unknown_token(tokenizer)
    assert unknown is not None
    return f"Texts with an unknown token ({tokenizer.id_to_token(unknown)})"
