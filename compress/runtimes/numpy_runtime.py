"""Runs static tables with numpy, checkpoints and variants alike, without torch or transformers.

The table stays in its file, memory-mapped: of a text, only the rows of its tokens are read. Nothing is padded: texts of one length
are looked up and summed together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.common.errors import UserError
from compress.layers.packing import unpack
from compress.layers.scheme import QuantizedLayer
from compress.models.embedder import TextEmbedder, Vectors, with_progress
from compress.models.files.headers import StoredTensor
from compress.models.folder import ModelFolder
from compress.models.text.spec import EmbedderSpec, HeadModule, Pooling
from compress.models.text.static import MAPPING, TABLE, TOKEN_WEIGHTS
from compress.models.text.tokens import Ids
from compress.runtimes.contract import NUMPY, Kind, pick_runtime

# Tokens whose vectors are in memory at a time: with 256 dimensions 1 MB, which stays in the caches of a core. Measured with a table
# of 30,000 rows of 256 dimensions, one thread: from 512 to 4,096 tokens are within a fifth, 32,768 are 1.4 times as slow.
BATCH_TOKENS = 1_024
# Tokens that are summed one after the other. A longer text is the sum of such sums, which keeps rounding errors small.
PIECE = 64
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "BF16": "<u2"}
LAYER_NORM_EPSILON = 1e-5  # torch's own, which sentence-transformers keeps
NORM_EPSILON = 1e-12  # torch's own

Step = Callable[[Vectors], Vectors]
"""Maps vectors, float32 [texts, width], to others."""


def mapped(tensor: StoredTensor) -> npt.NDArray[Any]:
    """Return a tensor in its file, memory-mapped and read-only, in its own dtype; bfloat16 as the uint16 of its bits."""
    offset, shape = tensor.info.offset or 0, tensor.info.shape
    file: npt.NDArray[Any] = np.memmap(tensor.path, dtype=DTYPES[tensor.info.dtype], mode="r", offset=offset, shape=shape)
    return np.asarray(file)  # a plain array over the same memory: indexing a memmap costs more


def float32(values: npt.NDArray[Any], dtype: str) -> Vectors:
    """Return values of a safetensors dtype in float32."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class FloatRows:
    """The rows of a table that is stored as floating point, or as integers without scales (model2vec's int8)."""

    table: npt.NDArray[Any]
    dtype: str

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.table)

    def __call__(self, rows: Ids) -> Vectors:
        """Return rows, float32 [rows, width]."""
        return float32(np.take(self.table, rows, axis=0), self.dtype)


@dataclass(frozen=True)
class IntegerRows:
    """The rows of a quantized table, with its integers as they are stored; see `compress.layers.quantized_embedding`."""

    layer: QuantizedLayer
    width: int
    weight: npt.NDArray[Any]
    scale: npt.NDArray[Any]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.weight)

    def integers(self, rows: Ids) -> npt.NDArray[np.int8]:
        """Return the integers of rows, less the middle of their range: int8 [rows, width]."""
        stored = np.take(self.weight, rows, axis=0)
        if stored.dtype == np.int8:
            return stored
        # Unsigned below 2^bits, with 7 bits at most: 8 bits are stored as int8.
        return unpack(stored, self.layer.bits, self.width).view(np.int8) - np.int8(2 ** (self.layer.bits - 1))

    def __call__(self, rows: Ids) -> Vectors:
        """Return rows, float32 [rows, width]: the integers times the scale of their group."""
        values, scale = self.integers(rows).astype(np.float32), self.scale[rows].astype(np.float32).reshape(len(rows), -1)
        if self.layer.group_size is not None:
            scale = np.repeat(scale, self.layer.group_size, axis=1)[:, : self.width]
        values *= scale
        return values


@dataclass(frozen=True)
class TokenVectors:
    """The vectors of tokens; see `compress.models.network.static.TokenVectors`."""

    rows: FloatRows | IntegerRows
    mapping: npt.NDArray[Any] | None
    weights: Vectors | None

    def __call__(self, ids: Ids) -> Vectors:
        """Map tokens, int64 [tokens], to float32 [tokens, width]."""
        vectors = self.rows(ids if self.mapping is None else self.mapping[ids])
        return vectors if self.weights is None else vectors * self.weights[ids, None]


def token_vectors(folder: ModelFolder) -> TokenVectors:
    """Open the table of a folder; no row of it is read."""
    tensors, shape = folder.tensors, folder.shape
    name, table = TABLE.removesuffix(".weight"), tensors[TABLE]
    rows: FloatRows | IntegerRows = FloatRows(mapped(table), table.info.dtype)
    if folder.variant is not None and name in folder.variant.quantized:
        scale = mapped(tensors[f"{name}.weight_scale"])
        rows = IntegerRows(folder.variant.quantized[name], shape.hidden_size, mapped(table), scale)
    mapping = np.array(mapped(tensors[MAPPING])) if MAPPING in tensors else None
    weights = tensors.get(TOKEN_WEIGHTS)
    return TokenVectors(rows, mapping, None if weights is None else float32(np.array(mapped(weights)), weights.info.dtype))


class NumpyEmbedder(TextEmbedder):
    """A static table as an embedder. Several threads may call `encode` at once."""

    threads = 1
    """Number of CPU threads that compute; the tokenizer has its own."""

    def __init__(self, folder: ModelFolder) -> None:
        """Open a folder; see `open_variant`."""
        super().__init__(folder.name, folder.spec, folder.tokenizer, folder.dimension, BATCH_TOKENS)
        self._vectors_of = token_vectors(folder)
        self._width = folder.shape.hidden_size
        self._steps = steps_of(folder)

    def embed(self, rows: Sequence[Ids], budget: int, pool_from: int, show: bool) -> Vectors:
        """Embed tokenized texts without padding; see `TextEmbedder.embed`."""
        vectors = self._means(rows, budget, show)
        for step in self._steps:
            vectors = step(vectors)
        return vectors

    def _means(self, rows: Sequence[Ids], budget: int, show: bool) -> Vectors:
        """Return the mean of each text's token vectors, float32 [texts, width]; zeros for a text without tokens."""
        counts = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        means = np.zeros((len(rows), self._width), dtype=np.float32)
        filled = np.flatnonzero(counts)
        if not len(filled):
            return means
        counts = counts[filled]
        pieces = -(-counts // PIECE)
        first = _starts(pieces)
        within = PIECE * (np.arange(pieces.sum()) - np.repeat(first, pieces))
        lengths = np.minimum(np.repeat(counts, pieces) - within, PIECE)
        sums = self._sums(np.concatenate(rows), np.repeat(_starts(counts), pieces) + within, lengths, budget, show)
        if len(sums) > len(filled):
            sums = np.add.reduceat(sums, first, axis=0)
        means[filled] = sums / counts[:, None].astype(np.float32)
        return means

    def _sums(self, ids: Ids, starts: Ids, lengths: Ids, budget: int, show: bool) -> Vectors:
        """Return the sum of the token vectors of each stretch of `ids`, float32 [stretches, width].

        Stretches of equal length are looked up together, so that nothing is padded: there are at most `PIECE` lengths.
        """
        sums = np.empty((len(starts), self._width), dtype=np.float32)
        order = np.argsort(lengths, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
        for group in with_progress(groups, "encoding", show):
            length = int(lengths[group[0]])
            for start in range(0, len(group), step := max(1, budget // length)):
                chosen = group[start : start + step]
                tokens = ids[starts[chosen, None] + np.arange(length)]
                vectors = self._vectors_of(tokens.ravel())
                sums[chosen] = vectors.reshape(len(chosen), length, self._width).sum(axis=1)
        return sums


def _starts(lengths: Ids) -> Ids:
    """Return where stretches of these lengths begin, one after the other, int64 [stretches]."""
    starts: Ids = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    return starts


def _gelu(x: Vectors) -> Vectors:
    # math.erf value by value: it sees one vector a text, not one a token.
    erf: Vectors = np.vectorize(math.erf, otypes=[np.float32])(x / np.float32(math.sqrt(2)))
    made: Vectors = x * np.float32(0.5) * (np.float32(1) + erf)
    return made


def _sigmoid(x: Vectors) -> Vectors:
    made: Vectors = np.reciprocal(np.float32(1) + np.exp(-x))
    return made


ACTIVATIONS: dict[str, Step] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "Sigmoid": _sigmoid,
    "GELU": _gelu,
}
"""Activation functions of Dense modules, by the name of their class in torch."""


def steps_of(folder: ModelFolder) -> list[Step]:
    """Return what comes after the mean, in order.

    Raises:
        UserError: it is something that only torch computes.
    """
    spec: EmbedderSpec = folder.spec
    if spec.poolings != (Pooling.MEAN,):
        raise UserError(f"{folder.path}: {NUMPY} computes the mean of a static table, not {' + '.join(spec.poolings)}")
    steps = [_step(folder, number, module) for number, module in enumerate(spec.modules)]
    if spec.normalize:
        steps.append(normalized)
    if spec.dimensions is not None:
        steps.append(partial(_leading, count=spec.dimensions))
    return steps


def _step(folder: ModelFolder, number: int, module: HeadModule) -> Step:
    if module.kind == "Normalize":
        return normalized
    prefix = f"text_head.after.{number}."
    own = {
        name.removeprefix(prefix): float32(np.array(mapped(tensor)), tensor.info.dtype)
        for name, tensor in folder.tensors.items()
        if name.startswith(prefix)
    }
    if module.kind == "LayerNorm":
        return partial(_layer_norm, weight=own["norm.weight"], bias=own["norm.bias"])
    activation = ACTIVATIONS.get(module.activation.rpartition(".")[2])
    if activation is None:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{folder.path}: {NUMPY} has no activation {module.activation}, only {known}", "runtime: torch")
    return partial(_dense, tensors=own, activation=activation, residual=module.residual)


def _dense(vectors: Vectors, tensors: dict[str, Vectors], activation: Step, residual: bool) -> Vectors:
    made = activation(vectors @ tensors["linear.weight"].T + tensors.get("linear.bias", np.float32(0)))
    if not residual:
        return made
    return made + (vectors @ tensors["residual.weight"].T if "residual.weight" in tensors else vectors)


def _layer_norm(vectors: Vectors, weight: Vectors, bias: Vectors) -> Vectors:
    centred = vectors - vectors.mean(axis=1, keepdims=True)
    variance = np.mean(centred**2, axis=1, keepdims=True)
    made: Vectors = centred / np.sqrt(variance + np.float32(LAYER_NORM_EPSILON)) * weight + bias
    return made


def normalized(vectors: Vectors) -> Vectors:
    """Scale vectors to unit length; a zero vector stays one."""
    made: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(NORM_EPSILON))
    return made


def _leading(vectors: Vectors, count: int) -> Vectors:
    return vectors[:, :count]


def open_variant(folder: ModelFolder, *, dtype: str | None = None, threads: int | None = None) -> NumpyEmbedder:
    """Open a static table, a variant of one or a checkpoint.

    Args:
        folder: the folder.
        dtype: dtype of the arithmetic, `float32`; None for the same.
        threads: ignored but for the protocol's sake; one thread computes.

    Raises:
        UserError: the model is not a static table, the dtype is another one, or something after the mean is not computed here.
    """
    info = folder.variant
    kind = Kind(static=folder.is_static, checkpoint=info is None)
    pick_runtime(NUMPY, info.quantized if info else {}, dtype=dtype, kind=kind)
    return NumpyEmbedder(folder)
