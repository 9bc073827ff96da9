"""Compares a model's vectors with those that it should give, text by text, and names the likeliest cause where they differ."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.measure.doctor.answers import Answers, BothSides, Facts, Side, agreement, norms_of, values_fit
from compress.measure.doctor.causes import Cause, CauseName, Roles, Search
from compress.measure.doctor.changes import LocalSide
from compress.measure.doctor.endpoint import Endpoint
from compress.measure.doctor.reference import PREFIX, SentenceTransformersSide
from compress.measure.doctor.texts import probe_texts
from compress.measure.doctor.weights import compression_of, precision_cause, weights_cause
from compress.models.embedder import BatchedEmbedder
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.runtimes.exported import is_export, open_export
from compress.runtimes.loading import open_source, runtime_of
from compress.runtimes.remote import is_url
from compress.runtimes.torch_embedder import TorchEmbedder

SAME = 0.9999
"""Lowest cosine of two vectors that are the same but for rounding in float32."""
SAME_COMPRESSED = 0.95
"""Where one side's weights are quantized or pruned."""
NORM_TOLERANCE = 0.01
NO_BOUND = -1.0
MODEL, REFERENCE = "the model", "the reference"


@dataclass(frozen=True)
class Options:
    """How the two sides are opened and compared; the command's options."""

    reference: str | None = None
    prompt: str | None = None
    """A prompt's name, or the text itself; None: each side's default."""
    python: Path | None = None
    """Interpreter that has sentence-transformers; None: this one."""
    key_variable: str | None = None
    """Environment variable with the API key of endpoints."""
    timeout: float = 60.0
    """Seconds for a request to an endpoint."""
    at_least: float | None = None
    """Lowest cosine that counts as the same; None: `SAME`, or `SAME_COMPRESSED`."""
    device: str | None = None
    dtype: str | None = None
    runtime: str | None = None
    """Of the model, not of the reference."""
    stream: bool = False
    say: Callable[[str], None] = lambda _: None


class TextRow(BaseModel):
    """A text, and how far both sides agree on it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    cosine: float | None
    """None: a side refused the text."""
    note: str = ""


class Diagnosis(BaseModel):
    """What came out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Facts
    reference: Facts
    dimension: int
    norms: tuple[str, str]
    """Of the model's and the reference's vectors: lowest and highest."""
    values: tuple[str, str]
    """The narrowest dtype that holds all of the model's and of the reference's values."""
    at_least: float
    texts: tuple[TextRow, ...]
    causes: tuple[Cause, ...]
    """Likeliest first; empty where both sides give the same vectors."""
    notes: tuple[str, ...] = ()

    @property
    def lowest(self) -> float:
        """Lowest cosine of a text."""
        return min(row.cosine for row in self.texts if row.cosine is not None)

    @property
    def same(self) -> bool:
        """Whether both sides give the same vectors."""
        return not self.causes


def diagnose(model: str, options: Options) -> Diagnosis:
    """Compare a model with its reference.

    Args:
        model: a built-in name, a folder, a run, an export, a hub name; the address of an endpoint; or one of the folders after
            `sentence-transformers:`, to be read by that library.
        options: what it is compared with, and how.

    Raises:
        UserError: a side cannot be opened or refuses every text, or their vectors have different widths.
    """
    side = _open(model, options)
    reference = _reference(model, side, options)
    prompts = [_prompt_of(one, options.prompt, other) for one, other in ((side, reference), (reference, side))]
    texts = [probe.text for probe in probe_texts()]
    options.say(f"encoding {len(texts)} texts: {side.name}, {reference.name}")
    answers = side.answer(texts, prompts[0])
    expected = reference.answer(texts, prompts[1])
    _check_widths(side, answers, reference, expected)
    cosines = agreement(answers.vectors, expected.vectors)
    if np.isnan(cosines).all():
        raise UserError(f"{side.name}, {reference.name}: no text is embedded by both")
    index = IndexCheck.of(side, reference)
    at_least = options.at_least or (SAME_COMPRESSED if _compressed(side) or _compressed(reference) else SAME)
    if index is not None and index.fits and options.at_least is None:
        at_least = NO_BOUND  # vectors of two models: how near they are was measured when they were aligned
    comparison = Comparison(side, reference, answers, expected, prompts, cosines, at_least)
    causes, notes = ([], [index.said]) if index is not None and index.fits else comparison.causes()
    if index is not None and not index.fits:
        causes.insert(0, Cause(name=CauseName.INDEX, words=index.said))
    return Diagnosis(
        model=side.facts(),
        reference=reference.facts(),
        dimension=answers.vectors.shape[1],
        norms=(_range(answers), _range(expected)),
        values=(values_fit(answers.vectors), values_fit(expected.vectors)),
        at_least=at_least,
        texts=tuple(
            TextRow(
                kind=probe.kind,
                cosine=None if np.isnan(cosines[index]) else float(cosines[index]),
                note=_refusals(index, answers, expected),
            )
            for index, probe in enumerate(probe_texts())
        ),
        causes=tuple(causes),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class IndexCheck:
    """Whether the reference is the model that an aligned variant's queries are made for."""

    fits: bool
    said: str

    @classmethod
    def of(cls, side: Side, reference: Side) -> IndexCheck | None:
        """Compare the reference's files with those that the model was aligned to; None: it is no other model, or not aligned."""
        folders = [one.folder if isinstance(one, LocalSide) else None for one in (side, reference)]
        info = None if folders[0] is None else folders[0].variant
        if info is None or info.aligned_to is None or folders[1] is None or folders[1].is_variant:
            return None
        to, found = info.aligned_to, folders[1].fingerprint
        if found == to.fingerprint:
            measured = f"mean cosine {to.cosine_mean:.4f} on {to.held_out:,} held-out texts when it was aligned"
            return cls(True, f"{MODEL} is aligned to {to.name}, and {REFERENCE} is that model ({found}): {measured}")
        return cls(
            False,
            f"{MODEL} is aligned to {to.name} ({to.fingerprint}), and {REFERENCE} is {folders[1].name} ({found}): an index that it "
            "made is searched by another alignment (compress align)",
        )


class Comparison(BothSides):
    """Both sides, and why they differ."""

    def causes(self) -> tuple[list[Cause], list[str]]:
        """Return what differs, and what else there is to say."""
        notes: list[str] = []
        causes: list[Cause] = []
        if np.nanmin(self.cosines) < self.at_least:
            causes = self._found(notes)
        causes += self._norms()
        if all(cause.name is not CauseName.PROMPT for cause in causes):
            causes += self._prompt_tables()
        return causes, notes

    def _found(self, notes: list[str]) -> list[Cause]:
        search = self._search()
        if search is not None:
            causes = search.explain(np.flatnonzero(~np.isnan(self.cosines)))
            notes += search.notes
            if causes:
                return causes
        else:
            notes.append("nothing was tried: neither side can be encoded otherwise here; give a folder as the reference")
        precision = precision_cause(self, notes)
        return [precision if precision is not None else weights_cause(self)]

    def _search(self) -> Search | None:
        """Take the side that can be changed most: in torch before a graph before an endpoint, the reference before the model."""
        is_reference = _changeable(self.reference) >= _changeable(self.side)
        ours, theirs = (MODEL, self.side, self.answers), (REFERENCE, self.reference, self.expected)
        (role, varied, _), (other_role, other, answers) = (theirs, ours) if is_reference else (ours, theirs)
        if not isinstance(varied, LocalSide | Endpoint):
            return None
        prompt = self.prompts[1 if is_reference else 0]
        default = varied.embedder.spec.default_prompt if isinstance(varied, LocalSide) else ""
        texts = [probe.text for probe in probe_texts()]
        roles = Roles(varied, role, other, other_role)
        return Search(roles, answers.vectors, texts, default if prompt is None else prompt, self.at_least)

    def _norms(self) -> list[Cause]:
        """Compare lengths, which cosines do not see."""
        there = ~np.isnan(self.cosines)
        ours = np.linalg.norm(self.answers.vectors[there].astype(np.float64), axis=1)
        theirs = np.linalg.norm(self.expected.vectors[there].astype(np.float64), axis=1)
        allowed = NORM_TOLERANCE if self.at_least >= SAME else 1 - self.at_least
        unit = [bool(np.allclose(norms[norms > 0], 1, atol=1e-2)) for norms in (ours, theirs)]
        if np.allclose(ours, theirs, rtol=allowed, atol=1e-6) or (not any(unit) and self.at_least < SAME):
            return []
        words = {True: "gives vectors of unit length", False: "does not normalise"}
        said = f"{MODEL} {words[unit[0]]}; {REFERENCE} {words[unit[1]]}"
        if unit[0] == unit[1]:
            said = f"{MODEL} and {REFERENCE} give vectors of different lengths: {_range(self.answers)}, {_range(self.expected)}"
        return [Cause(name=CauseName.NORM, words=said)]

    def _prompt_tables(self) -> list[Cause]:
        """Compare prompts by name: what `encode(texts, prompt)` is given by those who use them."""
        ours, theirs = self.side.prompts, self.reference.prompts
        if ours is None or theirs is None or ours == theirs:
            return []
        names = [name for name in [*theirs, *ours] if ours.get(name) != theirs.get(name)]
        shown = "; ".join(
            f"{name!r}: {MODEL} {_shown(ours.get(name))}, {REFERENCE} {_shown(theirs.get(name))}" for name in dict.fromkeys(names)
        )
        return [Cause(name=CauseName.PROMPT, words=f"prompts by name differ: {shown[:400]}")]


def _changeable(side: Side) -> int:
    """Return how much of a side can be changed: 3 in torch, 2 in a graph or streamed, 1 in an endpoint, 0: nothing."""
    if isinstance(side, LocalSide):
        return 3 if isinstance(side.embedder, TorchEmbedder) else 2
    return 1 if isinstance(side, Endpoint) else 0


def _shown(prompt: str | None) -> str:
    return "has none" if prompt is None else f"has {prompt!r}"


def _open(name: str, options: Options, *, is_model: bool = True) -> Side:
    if is_url(name):
        return Endpoint(name, options.key_variable, options.timeout)
    if name.startswith(PREFIX):
        source = find(name.removeprefix(PREFIX))
        return _through_sentence_transformers(source, options)
    if is_export(Path(name)):
        export = open_export(Path(name))
        return LocalSide(export, None, f"export, {export.runtime}")
    return _local(find(name), options, is_model)


def _local(source: ModelFolder, options: Options, is_model: bool) -> LocalSide:
    if source.routes is not None:
        raise source.routes.refusal()
    # A checkpoint in float32, so that rounding is no difference where it is not asked for; a variant as it is made for.
    dtype = (options.dtype if is_model else None) or (None if source.is_variant else "float32")
    runtime = options.runtime if is_model else None
    # Padded: causes are looked for with masks of our own, which packed batches do not take.
    embedder = open_source(source, runtime=runtime, device=options.device, dtype=dtype, stream=options.stream, batching="padded")
    assert isinstance(embedder, BatchedEmbedder)
    name = runtime_of(source, runtime, device=options.device, dtype=dtype)
    kind = "variant" if source.is_variant else "folder"
    return LocalSide(embedder, source, f"{kind}, {name}{', streamed' if options.stream else ''}")


def _through_sentence_transformers(source: ModelFolder, options: Options) -> SentenceTransformersSide:
    return SentenceTransformersSide(source.name, source.path, options.python or Path(sys.executable))


def _reference(model: str, side: Side, options: Options) -> Side:
    """Open what was named; else sentence-transformers on the same folder, or the model that a variant was made from."""
    if options.reference is not None:
        return _open(options.reference, options, is_model=False)
    if isinstance(side, SentenceTransformersSide):
        return _local(find(model.removeprefix(PREFIX)), options, is_model=False)
    if isinstance(side, LocalSide) and side.folder is not None:
        if side.folder.variant is None:
            return _through_sentence_transformers(side.folder, options)
        if side.folder.variant.aligned_to is not None:
            return _open(side.folder.variant.aligned_to.name, options, is_model=False)
        return _open(side.folder.variant.base, options, is_model=False)
    raise UserError(f"{model}: what it should be is not known", "--reference names a folder, a run, a hub name or an endpoint")


def _prompt_of(side: Side, prompt: str | None, other: Side) -> str | None:
    """Return what a side puts before texts: what it has under that name, else the text itself; None: its default."""
    if prompt is None:
        return None
    if prompt in (side.prompts or {}):
        return (side.prompts or {})[prompt]
    return "" if prompt in (other.prompts or {}) else prompt


def _compressed(side: Side) -> bool:
    return isinstance(side, LocalSide) and side.folder is not None and compression_of(side.folder) is not None


def _check_widths(side: Side, answers: Answers, reference: Side, expected: Answers) -> None:
    """See that vectors are of one width.

    Raises:
        UserError: they are not; says whether one is the beginning of the other.
    """
    ours, theirs = answers.vectors.shape[1], expected.vectors.shape[1]
    if ours == theirs:
        return
    width = min(ours, theirs)
    start = float(np.nanmean(agreement(answers.vectors[:, :width], expected.vectors[:, :width])))
    hint = "another model, or another Dense module"
    if start > SAME_COMPRESSED:
        hint = f"the narrower one is the beginning of the wider one (mean cosine {start:.5f} over {width:,} dimensions): it was cut"
    raise UserError(f"{side.name}: {ours:,} dimensions; {reference.name}: {theirs:,}; these are not comparable", hint)


def _range(answers: Answers) -> str:
    norms = norms_of(answers.vectors)
    return f"{norms.min():.4g} to {norms.max():.4g}" if len(norms) else "all zero"


def _refusals(index: int, answers: Answers, expected: Answers) -> str:
    reasons = [
        f"{role} refuses it: {found.refused[index]}"
        for role, found in ((MODEL, answers), (REFERENCE, expected))
        if index in found.refused
    ]
    return "; ".join(reasons)
