"""Vectors in fewer dimensions or fewer bits, and search in them; fitted on calibration texts. Needs only numpy.

Truncation keeps the leading dimensions; it is meant for models trained for it (Kusupati et al. 2022, arXiv 2205.13147). PCA keeps
the directions of largest variance. int8 takes one range per dimension from the calibration vectors. binary stores on which side of
the calibration median a value lies, and compares bits. Rescoring ranks the best results of a binary search again, with the query
in float32 (Yamada et al. 2021, arXiv 2106.00882, section 3.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from compress.common.errors import UserError
from compress.models.embedder import Vectors

LEVELS = 255
# Values beyond these percentiles of the calibration vectors are clipped.
PERCENTILES = (0.1, 99.9)
# Number of results of a binary search that are rescored: four times a hundred.
RESCORED = 400
_BITS_SET = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
_NAME = re.compile(r"^(?:(truncate|pca)-(\d+))?\+?(float32|int8|binary)?(\+rescore)?$")


@dataclass(frozen=True)
class VectorFormat:
    """How vectors are stored: which dimensions, in which numbers."""

    reduction: Literal["truncate", "pca"] | None
    dimensions: int | None
    """Number of dimensions that are kept; None: all."""
    store: Literal["float32", "int8", "binary"]
    rescore: bool

    @classmethod
    def parse(cls, name: str) -> VectorFormat:
        """Read a name such as `int8`, `pca-192`, `truncate-256+int8`, `binary+rescore`.

        Raises:
            UserError: it is not such a name.
        """
        found = _NAME.match(name)
        if not name or found is None or (found.group(4) and found.group(3) != "binary"):
            raise UserError(
                f"vector format {name!r}: not [truncate-N|pca-N][+][float32|int8|binary][+rescore]",
                "such as int8, pca-192, truncate-256+int8 or binary+rescore; only binary vectors are rescored",
            )
        reduction, dimensions, store, rescore = found.groups()
        return cls(reduction, int(dimensions) if dimensions else None, store or "float32", bool(rescore))  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """Name of the format, as `parse` reads it."""
        reduced = f"{self.reduction}-{self.dimensions}+" if self.reduction else ""
        return f"{reduced}{self.store}{'+rescore' if self.rescore else ''}"

    def bytes_per_vector(self, dimension: int) -> int:
        """Return what a stored vector takes, of a model with vectors of this dimension."""
        kept = self.dimensions or dimension
        return {"float32": 4 * kept, "int8": kept, "binary": (kept + 7) // 8}[self.store]


def unit(vectors: Vectors) -> Vectors:
    """Scale rows to unit length; a zero row stays zero."""
    scaled: Vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


class VectorCodec:
    """A format fitted to calibration vectors."""

    def __init__(self, format: VectorFormat, calibration: Vectors) -> None:
        """Fit to the vectors of calibration texts, float32 [texts, dimension].

        Raises:
            UserError: the format keeps more dimensions than the model has, or PCA more than there are texts.
        """
        count, dimension = calibration.shape
        kept = format.dimensions or dimension
        if kept > dimension or (format.reduction == "pca" and kept > count):
            limit = f"{dimension} dimensions" + (f" and {count} calibration texts" if format.reduction == "pca" else "")
            raise UserError(f"vector format {format.name!r}: keeps {kept} dimensions of a model with {limit}")
        self.format = format
        self._kept = kept
        self._axes: Vectors | None = None
        if format.reduction == "pca":
            # Not centred: similarities are angles at the origin, and a shift would change all of them.
            _, axes = np.linalg.eigh(np.asarray(unit(calibration).T @ unit(calibration), dtype=np.float64))
            self._axes = axes[:, ::-1][:, :kept].astype(np.float32)
        reduced = self.reduce(calibration)
        low, high = np.percentile(reduced, PERCENTILES, axis=0).astype(np.float32)
        self._low, self._step = low, np.maximum((high - low) / LEVELS, 1e-12).astype(np.float32)
        self._median = np.median(reduced, axis=0).astype(np.float32)

    @classmethod
    def fitted(
        cls, format: VectorFormat, dimension: int, *, low: Vectors | None, step: Vectors | None, threshold: Vectors | None
    ) -> VectorCodec:
        """Return the codec of a format without a reduction that was fitted before; see `grid` and `threshold`."""
        codec = cls.__new__(cls)
        empty = np.zeros(dimension, dtype=np.float32)
        codec.format, codec._kept, codec._axes = format, dimension, None
        codec._low, codec._step = empty if low is None else low, empty + 1 if step is None else step
        codec._median = empty if threshold is None else threshold
        return codec

    @property
    def grid(self) -> tuple[Vectors, Vectors]:
        """The value of code 0 and the distance between two codes, of each dimension: both float32 [kept]."""
        return self._low, self._step

    @property
    def threshold(self) -> Vectors:
        """From where on a dimension's bit is set, float32 [kept]."""
        return self._median

    def reduce(self, vectors: Vectors) -> Vectors:
        """Reduce vectors to the format's dimensions, at unit length: float32 [n, dimension] to [n, kept]."""
        scaled = unit(vectors)
        return unit(scaled @ self._axes if self._axes is not None else scaled[:, : self._kept])

    def encode(self, vectors: Vectors) -> npt.NDArray[np.generic]:
        """Return vectors as they are stored: float32, uint8 codes [n, kept], or bits [n, kept / 8]."""
        reduced = self.reduce(vectors)
        if self.format.store == "int8":
            codes: npt.NDArray[np.generic] = np.clip(np.rint((reduced - self._low) / self._step), 0, LEVELS).astype(np.uint8)
            return codes
        return np.packbits(reduced > self._median, axis=1) if self.format.store == "binary" else reduced

    def decode(self, stored: npt.NDArray[np.generic]) -> Vectors:
        """Return stored vectors as float32 [n, kept]; binary vectors become -1 and 1."""
        if self.format.store == "int8":
            decoded: Vectors = stored.astype(np.float32) * self._step + self._low
            return decoded
        if self.format.store == "binary":
            return np.unpackbits(stored.astype(np.uint8), axis=1, count=self._kept).astype(np.float32) * 2 - 1
        return stored.astype(np.float32)

    def search(self, queries: Vectors, stored: npt.NDArray[np.generic], top: int) -> tuple[Vectors, npt.NDArray[np.intp]]:
        """Find each query's best documents.

        Args:
            queries: float32 [queries, dimension], as the model returns them.
            stored: documents, as `encode` returns them.
            top: number of documents wanted.

        Returns:
            Scores [queries, found] and document numbers [queries, found], best first.
        """
        top = min(top, len(stored), RESCORED if self.format.rescore else len(stored))
        if self.format.store != "binary":
            return _best(self.reduce(queries) @ unit(self.decode(stored)).T, top)
        bits = self.encode(queries)
        scores = np.empty((len(queries), top), dtype=np.float32)
        found = np.empty((len(queries), top), dtype=np.intp)
        reduced = self.reduce(queries) - self._median
        for index, (own, own_reduced) in enumerate(zip(bits, reduced, strict=True)):
            distance = _BITS_SET[np.bitwise_xor(stored, own)].sum(axis=1, dtype=np.int32)  # type: ignore[call-overload]
            similarity = (1 - 2 * distance / self._kept)[None].astype(np.float32)
            if self.format.rescore:
                _, chosen = _best(similarity, RESCORED)
                again, order = _best((own_reduced[None] @ self.decode(stored[chosen[0]]).T).astype(np.float32), top)
                scores[index], found[index] = again[0], chosen[0][order[0]]
            else:
                best, order = _best(similarity, top)
                scores[index], found[index] = best[0], order[0]
        return scores, found


def _best(similarity: Vectors, top: int) -> tuple[Vectors, npt.NDArray[np.intp]]:
    """Return the `top` largest values of each row and their positions, largest first; equal values keep their order."""
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :top]
    return np.take_along_axis(similarity, order, axis=1), order


def rotation(source: Vectors, target: Vectors) -> Vectors:
    """Return the rotation, float32 [d, d], that brings `source` closest to `target`: `source @ rotation`, both [texts, d].

    This is the orthogonal Procrustes solution (Schoenemann 1966), regularized towards the identity for directions that the texts do
    not cover: two models of one family share those.
    """
    product = unit(source).T.astype(np.float64) @ unit(target).astype(np.float64)
    prior = np.trace(product) / len(product)
    left, _, right = np.linalg.svd(product + max(prior, 1e-12) * np.eye(len(product)))
    rotated: Vectors = (left @ right).astype(np.float32)
    return rotated
