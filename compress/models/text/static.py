"""Static tables: a vector for each token, and the mean of them for a text. No network, no torch here.

Two libraries read such folders, and they differ where it matters; each folder is read as its own library reads it.

With a `modules.json` that begins with StaticEmbedding, as sentence-transformers 6.2 does
(`sentence_transformers/sentence_transformer/modules/static_embedding.py`): `tokenizer.json` without special tokens; texts are cut
only where that file truncates; unknown tokens count like all others; a text without tokens is a zero vector. The table is
`embedding.weight`, or model2vec's `embeddings` with its `mapping` and `weights`. The modules after it follow.

Without one, and with `model_type: model2vec` in `config.json`, as model2vec 0.10 does (`model2vec/model.py`, `StaticModel.encode`):
a text is cut at `max_length` (512 unless config.json says otherwise; null: not at all) times the median length of the vocabulary's
tokens in characters, then tokenized without special tokens and cut at `max_length` tokens; unknown tokens are then left out.
Token t has the vector `embeddings[mapping[t]] * weights[t]`, each of the two where it is stored;
`normalize` in config.json (default false) scales the mean to unit length. Everything is computed in float32 here; model2vec
rounds the vectors of a float16 table to float16.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from compress.common.errors import UserError, nearest
from compress.common.inputs import read_json
from compress.models.files.headers import StoredTensor, stored_tensors
from compress.models.text.sentence_transformers import (
    MODULES,
    PROMPTS_FILE,
    STATIC,
    Module,
    read_prompts,
    without_last_normalize,
)
from compress.models.text.spec import EmbedderSpec, HeadModule
from compress.models.text.tokens import open_tokenizer

MODEL_TYPE = "static"
"""`model_type` of a variant that is a static table."""
MODEL2VEC = "model2vec"
"""`model_type` of model2vec's folders."""
TABLE, MAPPING, TOKEN_WEIGHTS = "embeddings.word_embeddings.weight", "embeddings.token_mapping", "embeddings.token_weights"
"""Tensors of a static table in a variant: the vectors, each token's row (where tokens share rows) and each token's factor."""
NAMES = {"embedding.weight": TABLE, "embeddings": TABLE, "mapping": MAPPING, "weights": TOKEN_WEIGHTS}
"""Names of these tensors in the files of sentence-transformers and of model2vec."""
TABLE_DTYPES = ("F32", "F16", "BF16", "F64", "I8")
MAX_LENGTH = 512
"""`max_length` of a model2vec folder that does not say."""


@dataclass(frozen=True)
class StaticConfig:
    """Sizes of a static table."""

    hidden_size: int
    """Width of the vectors of tokens."""
    vocab_size: int
    """Number of tokens."""
    vectors: int
    """Number of rows of the table; fewer than tokens where tokens share rows."""
    shared: bool
    """Whether a mapping says which row each token has."""
    weighted: bool
    """Whether each token has a factor."""
    num_hidden_layers: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the content of a variant's `config.json`."""
        content: dict[str, Any] = {"model_type": MODEL_TYPE, "hidden_size": self.hidden_size, "num_hidden_layers": 0}
        content["vocab_size"] = self.vocab_size
        if self.shared:
            content["shared_vectors"] = self.vectors
        if self.weighted:
            content["token_weights"] = True
        return content


def read_config(config: Mapping[str, Any]) -> StaticConfig:
    """Read the `config.json` of a variant.

    Raises:
        UserError: a size is missing.
    """
    for key in ("hidden_size", "vocab_size"):
        if key not in config:
            raise UserError(f"config.json of a static table lacks {key!r}")
    vectors = config.get("shared_vectors")
    tokens = int(config["vocab_size"])
    return StaticConfig(
        int(config["hidden_size"]), tokens, int(vectors or tokens), vectors is not None, bool(config.get("token_weights", False))
    )


def read_spec(folder: Path) -> EmbedderSpec:
    """Refuse a folder whose `config.json` is a variant's and that is not one: nothing in it says how it takes texts.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{folder}: model_type {MODEL_TYPE!r} is that of a variant, and variant.json is missing",
        "give the folder of the whole variant",
    )


def read_static(path: Path, modules: Sequence[Module]) -> StaticFiles | None:
    """Return the files of a static table; None if a folder holds another kind of model.

    Args:
        path: the model's folder.
        modules: what its `modules.json` lists.

    Raises:
        UserError: a StaticEmbedding stands where it cannot.
    """
    if any(module.kind == STATIC for module in modules):
        if modules[0].kind != STATIC or any(module.kind == STATIC for module in modules[1:]):
            raise UserError(f"{path / 'modules.json'}: StaticEmbedding is supported as the first module only")
        return StaticFiles(path, modules[0].folder, tuple(modules[1:]), None)
    if modules or not (path / "config.json").exists():
        return None
    config = read_json(path / "config.json")
    return StaticFiles(path, path, (), config) if config.get("model_type") == MODEL2VEC else None


@dataclass(frozen=True)
class StaticFiles:
    """The files of a static table in the layout of sentence-transformers or of model2vec; each is read once."""

    path: Path
    """The model's folder."""
    place: Path
    """Folder of the table and the tokenizer."""
    after: tuple[Module, ...]
    """The modules after the table."""
    model2vec: Mapping[str, Any] | None
    """model2vec's `config.json`, where the folder is read as model2vec does; None: as sentence-transformers does."""

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors by their names in a variant.

        Raises:
            UserError: one is not known, is missing, or is not what it should be.
        """
        found: dict[str, StoredTensor] = {}
        for name, tensor in stored_tensors(self.place).items():
            if name not in NAMES:
                raise UserError(f"{tensor.path}: {name}: not a tensor of a static table", nearest(name, NAMES))
            if NAMES[name] in found:
                raise UserError(
                    f"{tensor.path}: holds both {found[NAMES[name]].name} and {name}; which is the table cannot be told"
                )
            found[NAMES[name]] = tensor
        if TABLE not in found:
            raise UserError(f"{self.place}: no table of vectors in its safetensors file", "'embedding.weight' or 'embeddings'")
        table, mapping = found[TABLE], found.get(MAPPING)
        _check(table, 2, TABLE_DTYPES)
        tokens = table.info.shape[0]
        if mapping is not None:
            _check(mapping, 1, ("I32", "I64"))
            rows = np.frombuffer(mapping.read(), "<i4" if mapping.info.dtype == "I32" else "<i8")
            wrong = np.flatnonzero((rows < 0) | (rows >= tokens))
            if len(wrong):
                raise UserError(f"{mapping.path}: mapping: {wrong[0]} has row {rows[wrong[0]]} of a table of {tokens} rows")
            tokens = len(rows)
        if TOKEN_WEIGHTS in found:
            weights = found[TOKEN_WEIGHTS]
            _check(weights, 1, TABLE_DTYPES[:-1])
            if weights.info.shape[0] != tokens:
                raise UserError(f"{weights.path}: weights: has {weights.info.shape[0]} entries for {tokens} tokens")
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The `config.json` that a variant of it has."""
        rows, width = self.tensors[TABLE].info.shape
        mapping = self.tensors.get(MAPPING)
        tokens = rows if mapping is None else mapping.info.shape[0]
        return StaticConfig(width, tokens, rows, mapping is not None, TOKEN_WEIGHTS in self.tensors).as_json()

    @cached_property
    def _opened(self) -> tuple[Tokenizer, Mapping[str, Any]]:
        """The tokenizer without special tokens, and how its file says that texts are cut; empty: not at all.

        Raises:
            UserError: there is no tokenizer, or it has more tokens than the table has vectors for.
        """
        tokenizer = open_tokenizer(self.place)
        highest, count = max(tokenizer.get_vocab().values(), default=-1), self.config["vocab_size"]
        if highest >= count:
            raise UserError(
                f"{self.place / 'tokenizer.json'}: has a token of number {highest}; the table has vectors for {count} tokens"
            )
        truncation = tokenizer.truncation or {}
        # Neither library asks for special tokens, and all that a post-processor does to ids is to add them.
        tokenizer.post_processor = None
        return tokenizer, truncation

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which adds no special tokens."""
        return self._opened[0]

    @cached_property
    def spec(self) -> EmbedderSpec:
        """How texts are taken, and what comes after the mean.

        Raises:
            UserError: a module or a key that this workbench does not know or cannot run.
        """
        prompts = read_prompts(self.path / PROMPTS_FILE)
        if self.model2vec is not None:
            return EmbedderSpec(**_as_model2vec(self.place, self.model2vec, self.tokenizer), **prompts)
        truncation = self._opened[1]
        after: list[HeadModule] = []
        for module in self.after:
            read = MODULES[module.kind](module.folder) if module.kind in MODULES else None
            if read is None or (not isinstance(read, HeadModule) and read):  # a Dropout reads as nothing
                raise UserError(f"{self.path / 'modules.json'}: {module.kind} is not supported after StaticEmbedding")
            if isinstance(read, HeadModule):
                after.append(read)
        left, normalize = without_last_normalize(after)
        return EmbedderSpec(
            modules=left,
            normalize=normalize,
            max_length=truncation.get("max_length"),
            truncation_side=str(truncation.get("direction", "right")).lower(),  # type: ignore[arg-type]
            **prompts,
        )


def _as_model2vec(place: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what model2vec's `config.json` says of texts and vectors, as fields of a spec."""
    longest = config.get("max_length", MAX_LENGTH)
    if longest is not None and (not isinstance(longest, int) or longest < 1):
        raise UserError(f"{place / 'config.json'}: max_length: must be a positive number or null, not {longest!r}")
    characters = None
    if longest is not None:
        characters = longest * median_length(tokenizer)
    return {
        "normalize": bool(config.get("normalize", False)),
        "max_length": longest,
        "max_characters": characters,
        "skip_unknown": True,
    }


def median_length(tokenizer: Tokenizer) -> int:
    """Return the median length of a tokenizer's tokens in characters, rounded down."""
    return int(statistics.median(map(len, tokenizer.get_vocab())))


def _check(tensor: StoredTensor, dimensions: int, dtypes: Sequence[str]) -> None:
    """See that a tensor has as many dimensions as it should, and a dtype that is read.

    Raises:
        UserError: it has not.
    """
    shape = list(tensor.info.shape)
    if len(shape) != dimensions or 0 in shape:
        raise UserError(f"{tensor.path}: {tensor.name}: has shape {shape}, which needs {dimensions} dimensions, none of them 0")
    if tensor.info.dtype not in dtypes:
        raise UserError(f"{tensor.path}: {tensor.name}: is {tensor.info.dtype}, not one of {', '.join(dtypes)}")
