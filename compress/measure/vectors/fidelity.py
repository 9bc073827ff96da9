"""How close a variant's vectors are to the baseline's, text by text and in what they retrieve. Needs only numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.measure.accuracy.statistics import Spearman, score
from compress.measure.vectors.codec import unit
from compress.models.embedder import Vectors

NEIGHBOURS = 10
FAR_NEIGHBOURS = 100
WORST = 5
# In a space where different texts are this similar on average, texts cannot be told apart.
COLLAPSED_COSINE = 0.999
SHOWN_CHARACTERS = 100


class WorstText(BaseModel):
    """A text whose two vectors differ most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    cosine: float


class Fidelity(BaseModel):
    """Agreement between two embedders' vectors of the same texts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    texts: int
    cosine_mean: float | None = None
    """Mean cosine between a text's two vectors. None if these have different widths, like the other two cosines."""
    cosine_p1: float | None = None
    """First percentile of the cosines: one text in a hundred is worse."""
    cosine_min: float | None = None
    """Lowest cosine."""
    overlap_at_10: float
    """Mean share of a text's ten nearest other texts that both embedders agree on."""
    overlap_at_100: float | None = None
    """The same for the hundred nearest. None if there are fewer than two hundred texts."""
    similarity_spearman: float | None = None
    """Rank correlation between the two embedders' similarities of all pairs of texts."""
    norm_ratio: float | None = None
    """Mean norm of the variant's vectors divided by that of the baseline's; 1 if the model normalises."""
    mean_cosine: dict[str, float] = {}
    """Mean cosine between different texts, for each embedder. It is higher the less isotropic the space is."""
    cosines: tuple[float, ...] = ()
    """Cosines of all texts, lowest first, to six digits."""
    worst: tuple[WorstText, ...] = ()
    """The texts with the lowest cosines."""

    def in_short(self) -> str:
        """Return a one-line summary."""
        if self.cosine_mean is None:
            return f"vectors of another width; neighbour overlap@10 {self.overlap_at_10:.3f}"
        return f"cosine mean {self.cosine_mean:.5f}, min {self.cosine_min:.5f}"


def cosines(a: Vectors, b: Vectors) -> Vectors:
    """Return the cosine of each row of `a` with the same row of `b`: [n, d] twice to [n]."""
    rows: Vectors = np.einsum("nd,nd->n", unit(a), unit(b))
    return rows


def neighbours(vectors: Vectors, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
    """Return the indices of each row's `count` nearest other rows by cosine, [n, count], unordered."""
    scaled = unit(vectors)
    similarity = scaled @ scaled.T
    np.fill_diagonal(similarity, -np.inf)
    return np.argpartition(-similarity, count - 1, axis=1)[:, :count]


def fidelity(baseline: Vectors, variant: Vectors, texts: Sequence[str] = ()) -> Fidelity:
    """Compare two embedders' vectors of the same texts: float32 [n, d] each; the widths may differ.

    Raises:
        ValueError: the numbers of vectors differ, or there are too few texts for ten neighbours.
        UserError: the variant's vectors are not finite, or are nearly the same for all texts while the baseline's are not.
    """
    if len(baseline) != len(variant):
        raise ValueError(f"vectors of the same texts are compared, got {baseline.shape} and {variant.shape}")
    if len(baseline) <= NEIGHBOURS:
        raise ValueError(f"at least {NEIGHBOURS + 1} texts are needed, got {len(baseline)}")
    if not np.isfinite(variant).all():
        raise UserError(f"the variant's vectors of {int((~np.isfinite(variant)).any(axis=1).sum())} texts are not finite")
    agreement = cosines(baseline, variant) if baseline.shape == variant.shape else None
    upper = np.triu_indices(len(baseline), k=1)
    similarities = [(unit(vectors) @ unit(vectors).T)[upper] for vectors in (baseline, variant)]
    spread = {name: float(values.mean()) for name, values in zip(("baseline", "variant"), similarities, strict=True)}
    if spread["variant"] > COLLAPSED_COSINE > spread["baseline"]:
        raise UserError(
            f"the variant's space has collapsed: the mean cosine between different texts is {spread['variant']:.5f}, "
            f"the baseline's {spread['baseline']:.5f}"
        )
    enough = len(baseline) >= 2 * FAR_NEIGHBOURS
    worst: tuple[WorstText, ...] = ()
    if agreement is not None and len(texts):
        order = np.argsort(agreement, kind="stable")[:WORST]
        worst = tuple(WorstText(text=texts[index][:SHOWN_CHARACTERS], cosine=float(agreement[index])) for index in order)
    return Fidelity(
        texts=len(baseline),
        cosine_mean=None if agreement is None else float(agreement.mean()),
        cosine_p1=None if agreement is None else float(np.percentile(agreement, 1)),
        cosine_min=None if agreement is None else float(agreement.min()),
        overlap_at_10=_overlap(baseline, variant, NEIGHBOURS),
        overlap_at_100=_overlap(baseline, variant, FAR_NEIGHBOURS) if enough else None,
        similarity_spearman=score(Spearman(*(values.astype(np.float64) for values in similarities))),
        norm_ratio=float(np.mean(np.linalg.norm(variant, axis=1)) / np.mean(np.linalg.norm(baseline, axis=1))),
        mean_cosine=spread,
        cosines=() if agreement is None else tuple(round(float(cosine), 6) for cosine in np.sort(agreement)),
        worst=worst,
    )


def _overlap(baseline: Vectors, variant: Vectors, count: int) -> float:
    pairs = zip(neighbours(baseline, count), neighbours(variant, count), strict=True)
    return float(np.mean([len(np.intersect1d(ours, theirs)) / count for ours, theirs in pairs]))
