"""Why two sides differ: one of them is encoded with something changed, and what makes it agree with the other is the cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import combinations

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from compress.measure.doctor.answers import Cosines, Side, agreement
from compress.measure.doctor.changes import Change, Cut, LocalSide, mask_problem, poolings
from compress.measure.doctor.endpoint import Endpoint
from compress.measure.doctor.texts import probe_texts
from compress.models.embedder import Vectors
from compress.runtimes.torch_embedder import TorchEmbedder

Indices = npt.NDArray[np.intp]
# Of public models (E5, nomic, bge, EmbeddingGemma, Qwen3-Embedding): servers put them before texts by themselves.
USUAL_PROMPTS = (
    "query: ",
    "passage: ",
    "search_query: ",
    "search_document: ",
    "Represent this sentence for searching relevant passages: ",
    "task: search result | query: ",
    "title: none | text: ",
    "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:",
)
# NV-Embed has a prompt for each of a hundred tasks.
MOST_PROMPTS = 24
USUAL_LENGTHS = (128, 256, 384, 512, 1024, 2048, 4096, 8192)
# No model cuts shorter than this, unless it says so.
SHORT_TOKENS = 96
# Texts that every hypothesis is tried on; what explains these is tried on all.
FEW = 5
# A change that does not explain a difference is worth a word if it takes at least this share of it away.
PART = 0.5


class CauseName(StrEnum):
    """What differs."""

    PROMPT = "prompt"
    POOLING = "pooling"
    ATTENTION = "causal mask"
    TRUNCATION = "truncation"
    SPECIALS = "special tokens"
    CASE = "case"
    PROMPT_POOLED = "prompt's tokens pooled"
    NORM = "normalisation"
    PRECISION = "dtype"
    COMPRESSION = "compression"
    WEIGHTS = "other weights"
    INDEX = "another index"
    UNKNOWN = "not found"


class Cause(BaseModel):
    """Something that differs, most likely."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: CauseName
    words: str
    lowest_cosine: float | None = None
    """Between the two sides once it is undone, over the texts that it was tried on; None: not tried by encoding anew."""


@dataclass(frozen=True)
class Hypothesis:
    """Something that may differ."""

    name: CauseName
    change: Change
    other: str
    """What the other side then does, as in "the model ..."."""
    varied: str
    """What the side that is encoded anew does."""


@dataclass(frozen=True)
class Trial:
    """What came of one or two hypotheses."""

    group: tuple[Hypothesis, ...]
    lowest: float
    """Cosine to the other side's vectors."""
    mean: float


@dataclass(frozen=True)
class Roles:
    """Which side is encoded anew, and what either is called: `the model` or `the reference`."""

    varied: LocalSide | Endpoint
    varied_role: str
    other: Side
    other_role: str


@dataclass
class Search:
    """One side that can be encoded anew, and the other's vectors to be explained."""

    roles: Roles
    vectors: Vectors
    """Of the other side, float32 [n, dimension]."""
    texts: Sequence[str]
    prompt: str
    """What the varied side puts before texts."""
    at_least: float
    """Cosine from which on two vectors are the same."""
    notes: list[str] = field(default_factory=list)

    def cosines(self, change: Change, indices: Indices) -> Cosines:
        """Encode some of the texts with something changed: the cosines to the other side's vectors, float64 [len(indices)]."""
        texts = [self.texts[index] for index in indices]
        if isinstance(self.roles.varied, LocalSide):
            made = self.roles.varied.changed(texts, self.prompt, change)
        else:
            made = self.roles.varied.answer(texts, self.prompt if change.prompt is None else change.prompt).vectors
        return agreement(made, self.vectors[indices])

    def explain(self, compared: Indices) -> list[Cause]:
        """Look for what explains the difference: in short texts what has nothing to do with cutting, then in long ones the cut.

        Args:
            compared: the texts that both sides have embedded.

        Returns:
            What was found; empty where nothing explains all of it.
        """
        is_long = self._long()[compared]
        short, long = compared[~is_long], compared[is_long]
        found: list[Cause] = []
        change = Change()
        if self._differs(change, short):
            best = self._best(change, list(self._readings()), short)
            if best is None:
                return []
            change, found = best
        if self._differs(change, long):
            best = self._best(change, list(self._cuts()), long) or self._exact_cut(change, long)
            if best is None and not found:  # long texts alone: something that only they show
                best = self._best(change, list(self._readings()), long)
            found = found + ([self._unknown_cut()] if best is None else best[1])
        return found

    def _unknown_cut(self) -> Cause:
        words = "only long texts differ: they are cut elsewhere than was tried, or positions count otherwise"
        return Cause(name=CauseName.TRUNCATION, words=f"{words} ({self._words_of_cut()})")

    def _words_of_cut(self) -> str:
        varied = self.roles.varied
        return f"{self.roles.varied_role} {_cuts(varied.cut)}" if isinstance(varied, LocalSide) else "neither says where it cuts"

    def _long(self) -> npt.NDArray[np.bool_]:
        """Tell which texts a side may cut, bool [n]: of a model that runs here by their tokens."""
        if not isinstance(self.roles.varied, LocalSide):
            return np.array([probe.long for probe in probe_texts()])
        longest = min(self.roles.varied.cut.length, self.roles.other.facts().max_length or SHORT_TOKENS)
        return np.array(self._lengths(self.roles.varied)) > min(SHORT_TOKENS, longest // 2)

    def _lengths(self, varied: LocalSide) -> list[int]:
        return varied.embedder.tokenizer.lengths([self.prompt + text for text in self.texts])

    def _differs(self, change: Change, indices: Indices) -> bool:
        return len(indices) > 0 and not self._explains(self.cosines(change, indices))

    def _explains(self, cosines: Cosines) -> bool:
        return bool(np.nanmin(cosines, initial=1.0) >= self.at_least)

    def _best(self, known: Change, hypotheses: Sequence[Hypothesis], indices: Indices) -> tuple[Change, list[Cause]] | None:
        """Return the change that explains the difference best, alone or with a second one; None: none does."""
        now = self.cosines(known, indices)
        few = indices[np.argsort(np.nan_to_num(now, nan=1.0), kind="stable")[:FEW]]  # those that differ most
        tried: list[Trial] = []
        for size in (1, 2):
            for group in combinations(hypotheses, size):
                if len({hypothesis.name for hypothesis in group}) < size:
                    continue
                cosines = self.cosines(_together(known, group), few)
                if not np.isnan(cosines).all():
                    tried.append(Trial(group, float(np.nanmin(cosines)), float(np.nanmean(cosines))))
            best = self._confirmed(known, [trial for trial in tried if trial.lowest >= self.at_least], indices)
            if best is not None:
                return best
            hypotheses = [one for one in hypotheses if one.name in (CauseName.PROMPT, CauseName.POOLING, CauseName.ATTENTION)]
        self._note_part(1 - float(np.nanmean(self.cosines(known, few))), tried)
        return None

    def _confirmed(self, known: Change, trials: Sequence[Trial], indices: Indices) -> tuple[Change, list[Cause]] | None:
        """Try on all texts what explains a few, and return the best; what else explains them is noted."""
        confirmed = []
        for trial in trials:
            cosines = self.cosines(_together(known, trial.group), indices)
            if self._explains(cosines):
                confirmed.append(Trial(trial.group, float(np.nanmin(cosines)), float(np.nanmean(cosines))))
        if not confirmed:
            return None
        best = max(confirmed, key=lambda trial: round(trial.lowest, 6))  # of equal ones the first
        others = [trial for trial in confirmed if trial is not best]
        self.notes += [f"explains it as well: {self._group_words(trial.group)}" for trial in others]
        causes = [Cause(name=one.name, words=self._words(one), lowest_cosine=best.lowest) for one in best.group]
        return _together(known, best.group), causes

    def _note_part(self, before: float, tried: Sequence[Trial]) -> None:
        """Note the change that takes away much of the difference and not all: `before` is 1 - mean cosine without it."""
        best = max(tried, key=lambda trial: trial.mean, default=None)
        if best is not None and 1 - best.mean <= PART * before:
            words = self._group_words(best.group)
            self.notes.append(f"explains a part (mean cosine {1 - before:.4f} without it, {best.mean:.4f} with it): {words}")

    def _exact_cut(self, known: Change, indices: Indices) -> tuple[Change, list[Cause]] | None:
        """Search for the length at which the other side cuts: the nearer, the more alike are the vectors."""
        varied = self.roles.varied
        if not isinstance(varied, LocalSide):
            return None
        for side in ("right", "left"):
            low, high = 3, min(varied.cut.length, max(self._lengths(varied)))

            def likeness(length: int, side: str = side) -> float:
                return float(np.nanmean(self.cosines(known.and_also(Change(cut=Cut(side, length))), indices)))

            while high - low > 2:
                third = (high - low) // 3
                left, right = low + third, high - third
                low, high = (low, right) if likeness(left) >= likeness(right) else (left, high)
            cut = Cut(side, max(range(low, high + 1), key=likeness))
            hypothesis = Hypothesis(CauseName.TRUNCATION, Change(cut=cut), _cuts(cut), _cuts(varied.cut))
            found = self._confirmed(known, [Trial((hypothesis,), 1.0, 1.0)], indices)
            if found is not None:
                return found
        return None

    def _group_words(self, group: Iterable[Hypothesis]) -> str:
        return "; ".join(self._words(hypothesis) for hypothesis in group)

    def _words(self, hypothesis: Hypothesis) -> str:
        return f"{self.roles.other_role} {hypothesis.other}; {self.roles.varied_role} {hypothesis.varied}"

    def _readings(self) -> Iterator[Hypothesis]:
        """Yield what may differ and shows in short texts."""
        for prompt in self._prompts():
            change = Change(prompt=prompt)
            yield Hypothesis(CauseName.PROMPT, change, _puts(prompt), _puts(self.prompt))
            if isinstance(self.roles.varied, LocalSide) and prompt and not self.roles.varied.embedder.spec.pool_prompt:
                change = Change(prompt="", prefix=prompt)
                yield Hypothesis(CauseName.PROMPT, change, f"{_puts(prompt)} and pools it", _puts(self.prompt))
        if not isinstance(self.roles.varied, LocalSide):
            return
        pooling = self.roles.varied.pooling
        if pooling is not None:
            for mode in poolings():
                if mode is not pooling:
                    yield Hypothesis(CauseName.POOLING, Change(pooling=mode), f"pools by {mode}", f"pools by {pooling}")
        yield from self._masks(self.roles.varied)
        spec = self.roles.varied.embedder.spec
        yield Hypothesis(
            CauseName.SPECIALS, Change(specials=False), "adds no special tokens", "adds its tokenizer's special tokens"
        )
        words = ("takes the case as it is", "lowers texts")
        yield Hypothesis(CauseName.CASE, Change(lowercase=not spec.lowercase), words[not spec.lowercase], words[spec.lowercase])
        if self.prompt and pooling is not None:
            words = ("leaves the prompt's tokens out of the pooling", "pools the prompt's tokens too")
            change = Change(pool_prompt=not spec.pool_prompt)
            yield Hypothesis(CauseName.PROMPT_POOLED, change, words[not spec.pool_prompt], words[spec.pool_prompt])

    def _prompts(self) -> list[str]:
        named = [*(self.roles.varied.prompts or {}).values(), *(self.roles.other.prompts or {}).values()]
        candidates = dict.fromkeys(["", *named[: MOST_PROMPTS - len(USUAL_PROMPTS)], *USUAL_PROMPTS])
        return [prompt for prompt in candidates if prompt != self.prompt]

    def _masks(self, varied: LocalSide) -> Iterator[Hypothesis]:
        attention = varied.facts().attention
        if attention is None or not isinstance(varied.embedder, TorchEmbedder):
            return
        causal = attention == "bidirectional"  # what is tried is the other one
        problem = mask_problem(varied.embedder, causal)
        if problem is not None:
            self.notes.append(f"not tried: another mask in {self.roles.varied_role} ({problem})")
            return
        words = ("lets tokens see those after them (bidirectional attention)", "has a causal mask")
        yield Hypothesis(CauseName.ATTENTION, Change(causal=causal), words[causal], words[not causal])

    def _cuts(self) -> Iterator[Hypothesis]:
        """Yield other ways to cut texts, each of which some text shows."""
        if not isinstance(self.roles.varied, LocalSide):
            return
        now = self.roles.varied.cut
        longest = max(self._lengths(self.roles.varied))
        lengths = dict.fromkeys([now.length, now.length // 2, *USUAL_LENGTHS])
        other_length = self.roles.other.facts().max_length
        for length in [*([other_length] if other_length else []), *lengths]:
            for side in ("right", "left"):
                cut = Cut(side, length)
                # Longer than the model was made for is not tried: many networks have no positions there.
                if cut != now and 2 < length <= now.length and length < longest:
                    yield Hypothesis(CauseName.TRUNCATION, Change(cut=cut), _cuts(cut), _cuts(now))


def _together(known: Change, group: Iterable[Hypothesis]) -> Change:
    for hypothesis in group:
        known = known.and_also(hypothesis.change)
    return known


def _puts(prompt: str) -> str:
    return f"puts {prompt!r} before texts" if prompt else "puts no prompt before texts"


def _cuts(cut: Cut) -> str:
    kept = "first" if cut.side == "right" else "last"
    return f"cuts texts on the {cut.side} and keeps the {kept} {cut.length:,} tokens"
