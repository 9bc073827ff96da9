"""Checks a model against its card: runs the example that the card prints scores for."""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.models.source import find
from compress.runtimes.loading import open_source


class Acceptance(BaseModel):
    """Example from a model card: cosines x 100 of its queries (rows) with its passages (columns)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    model_type: str
    """The config's `model_type`; the example is for models of this type."""
    prompt: str
    """Prompt before the queries; passages have none."""
    queries: tuple[str, ...]
    passages: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    tolerance: float


class Verification(BaseModel):
    """Scores of a model on a card's example."""

    model_config = ConfigDict(frozen=True)

    model: str
    acceptance: Acceptance
    scores: tuple[tuple[float, ...], ...]

    @property
    def difference(self) -> float:
        """Largest difference from the card's scores."""
        return float(np.abs(np.subtract(self.scores, self.acceptance.scores)).max())

    @property
    def passed(self) -> bool:
        """Whether all scores agree with the card's."""
        return self.difference <= self.acceptance.tolerance


def acceptances() -> dict[str, Acceptance]:
    """Return the examples that come with the project, by model name."""
    folder = resources.files("compress.data") / "acceptance"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {
        file.name.removesuffix(".json").replace("--", "/"): Acceptance(**json.loads(file.read_text(encoding="utf-8")))
        for file in files
    }


def verify(model: str, *, device: str | None = None, dtype: str | None = None, stream: bool = False) -> Verification:
    """Run the card's example on a model.

    Args:
        model: any name that `compress.load` takes, variants included.
        device: as for `compress.load`.
        dtype: as for `compress.load`.
        stream: as for `compress.load`.

    Raises:
        UserError: the project has no example for models of this type.
    """
    source = find(model)
    kind = source.config.get("model_type")
    known = acceptances()
    acceptance = next((example for example in known.values() if example.model_type == kind), None)
    if acceptance is None:
        raise UserError(f"model {model!r}: no card example is known for model_type {kind!r}", f"known: {', '.join(known)}")
    embedder = open_source(source, device=device, dtype=dtype, stream=stream)
    # One call for each prompt: a streamed model is read once per call.
    queries = _unit(embedder.encode(acceptance.queries, acceptance.prompt))
    passages = _unit(embedder.encode(acceptance.passages, ""))
    scores = 100 * (queries @ passages.T)
    return Verification(model=source.name, acceptance=acceptance, scores=tuple(map(tuple, scores.tolist())))


def _unit(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    wide = vectors.astype(np.float64)
    norms: npt.NDArray[np.float64] = np.linalg.norm(wide, axis=1, keepdims=True)
    return wide / norms


def describe(found: Verification) -> str:
    """Format a verification for people."""
    acceptance = found.acceptance
    lines = [f"{found.model} on the example of the {acceptance.source}, cosines x 100", f"{'':24}{'card':>12}{'here':>12}"]
    for row, (theirs, ours) in enumerate(zip(acceptance.scores, found.scores, strict=True), start=1):
        for column, (expected, got) in enumerate(zip(theirs, ours, strict=True), start=1):
            lines.append(f"query {row} with passage {column:<3}{expected:12.5f}{got:12.5f}")
    verdict = "these are the card's scores" if found.passed else "these are NOT the card's scores"
    lines.append(f"{verdict}: largest difference {found.difference:.5f}, {acceptance.tolerance:g} allowed")
    return "\n".join(lines)
