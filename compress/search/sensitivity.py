"""Sensitivity: the scores of all choices for all groups of a model, kept in the cache and continued where they were stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from compress.calibration.texts import CalibrationSource
from compress.common.cache import use
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.common.locks import locked
from compress.common.machine import gpu_name, machine, now, versions
from compress.data.texts import calibration_texts, read_texts, texts_to_calibrate
from compress.measure.scored import versions_and_machine
from compress.measure.sensitivity import GroupScores, Sensitivity
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.opened import open_model
from compress.models.shape import ModelShape
from compress.models.source import check_original, find
from compress.pipeline.recipe import Recipe, steps_for
from compress.runtimes.contract import TORCH, runtime_named
from compress.search.choices import Choice, bytes_of, check_choices, choices_for
from compress.search.groups import Group, Per, groups_of

FEWEST = 16
"""Texts that have to be left to compare vectors on."""


@dataclass(frozen=True)
class SearchTexts:
    """Texts in three parts that share none: to calibrate on, to score on, and to try the result on."""

    calibration: tuple[str, ...]
    scored: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class SensitivityOptions:
    """What is scored, and on which texts."""

    choices: tuple[str, ...] | None = None
    """Names of the choices to score; None: all that the runtime executes."""
    per: Per = "group"
    """Whether layers that share an input get one choice, or each layer its own."""
    forward: bool = False
    """Whether each choice is run through the rest of the model, instead of taking derivatives."""
    texts: str = "embedded"
    """Texts, as `calibration.texts` of a recipe."""
    count: int = 384
    """Number of texts to calibrate on, `calibration.count` of the recipe that a search writes."""
    scored: int = 64
    """Number of other texts to compare vectors on."""
    max_tokens: int = 512
    directions: int = 8
    """Random directions for each text."""
    seed: int = 0
    runtime: str = TORCH
    device: str = "cpu"


def split_texts(options: SensitivityOptions) -> SearchTexts:
    """Draw the texts of a search.

    Raises:
        UserError: too few are left to score on.
    """
    drawn = texts_to_calibrate(options.texts, options.count, options.seed)
    taken = set(drawn)
    everything = calibration_texts() if options.texts == "embedded" else read_texts(options.texts)
    others = [text for text in dict.fromkeys(everything) if text not in taken and text.strip()]
    if len(others) < 2 * FEWEST:
        raise UserError(
            f"{options.texts}: {options.count} texts to calibrate on leave {len(others)} others, and scores need {2 * FEWEST}",
            "lower --count, or give more texts",
        )
    order = np.random.default_rng(options.seed + 1).permutation(len(others))
    shuffled = [others[index] for index in order]
    scored = min(options.scored, len(shuffled) // 2)
    return SearchTexts(tuple(drawn), tuple(shuffled[:scored]), tuple(shuffled[scored:]))


@dataclass(frozen=True)
class Subject:
    """A model with its groups and their choices."""

    model: str
    options: SensitivityOptions = SensitivityOptions()
    say: Callable[[str], None] = field(default=print, compare=False)

    @cached_property
    def source(self) -> ModelFolder:
        """The model's folder.

        Raises:
            UserError: there is no such model, or it cannot be compressed.
        """
        found = find(self.model)
        check_original(found)
        runtime_named(self.options.runtime)
        if found.is_static:
            raise UserError(f"model {found.name!r}: a static table has no layers to choose for", "try recipes of `embeddings`")
        return found

    @cached_property
    def exact(self) -> tuple[Method, ...]:
        """Steps that change nothing but rounding and come first: NV-Embed's fold."""
        return steps_for(Recipe(), self.source.shape_to_compress)

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape, after the exact steps, by the names of the network."""
        shape = open_model(self.source).shape
        for step in self.exact:
            shape = step.estimate(shape).after
        return shape

    @cached_property
    def choices(self) -> Mapping[Group, tuple[Choice, ...]]:
        """The choices of every group.

        Raises:
            UserError: a choice is not known, or the model has no layers to choose for.
        """
        options = self.options
        if options.choices is not None:
            check_choices(options.choices)
        try:
            groups = groups_of(self.shape, options.per)
        except ValueError as error:
            raise UserError(str(error)) from error
        return {group: choices_for(group, self.shape, options.runtime, options.choices) for group in groups}

    @cached_property
    def texts(self) -> SearchTexts:
        """The texts in their three parts."""
        return split_texts(self.options)

    def sourced(self, texts: Sequence[str]) -> CalibrationSource:
        """Return texts as steps take them, with the model's own prompts."""
        return CalibrationSource(texts, None, self.options.max_tokens)

    @cached_property
    def key(self) -> str:
        """A name for everything that decides the scores."""
        options = self.options
        decided = {
            "model": self.source.fingerprint,
            "choices": {group.name: [[choice.name, choice.step] for choice in offered] for group, offered in self.choices.items()},
            "texts": [self.texts.calibration, self.texts.scored],
            "how": [options.forward, options.max_tokens, options.directions, options.seed, options.runtime, options.device],
            "machine": versions_and_machine(options.device),
        }
        return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()[:16]


def sensitivity(model: str, options: SensitivityOptions = SensitivityOptions(), say: Callable[[str], None] = print) -> Sensitivity:
    """Score every choice for every group of a model's layers.

    Args:
        model: a built-in name, a folder or a hub name.
        options: what is scored, and on which texts.
        say: called with a line of progress.

    Raises:
        UserError: the model cannot be compressed, a choice is not known, or there are too few texts.
    """
    return sensitivity_of(Subject(model, options, say))


def sensitivity_of(subject: Subject) -> Sensitivity:
    """Return the sensitivity of a subject, from the cache if it is there; see `sensitivity`."""
    from compress.search.scores import score
    from compress.search.scoring import Passages, Scoring

    options, texts = subject.options, subject.texts
    journal = Journal(use("sensitivity", subject.key), checked=True)
    lock = journal.folder / "lock"
    with locked(lock, f"sensitivity of {subject.source}", wait=True, hint="", say=subject.say):
        if journal.has("record"):
            return Sensitivity.model_validate(journal.get("record"))
        start = time.monotonic()
        passages = Passages(
            calibration=subject.sourced(texts.calibration),
            scored=subject.sourced(texts.scored),
            directions=options.directions,
            forward=options.forward,
            seed=options.seed,
            device=options.device,
        )
        count = sum(len(offered) for offered in subject.choices.values())
        subject.say(f"scoring {count} choices of {len(subject.choices)} groups on {len(texts.scored)} texts")
        scores = score(Scoring(subject.source, subject.shape, subject.choices, passages, journal, subject.exact, say=subject.say))
        record = _record(subject, scores, time.monotonic() - start)
        journal.put("record", record.model_dump(mode="json"))
        for large in ("gradients", "texts"):
            shutil.rmtree(journal.folder / large, ignore_errors=True)
    return record


def _record(subject: Subject, scores: Mapping[str, Mapping[str, float]], seconds: float) -> Sensitivity:
    options = subject.options
    groups = tuple(
        GroupScores(
            **group.model_dump(),
            name=group.name,
            losses=dict(scores[group.name]),
            bytes={choice.name: bytes_of(choice, group, subject.shape) for choice in offered},
        )
        for group, offered in subject.choices.items()
    )
    return Sensitivity(
        model=subject.source.name,
        fingerprint=subject.source.fingerprint,
        how="forward" if options.forward else "derivatives",
        runtime=options.runtime,
        calibrated=len(subject.texts.calibration),
        scored=len(subject.texts.scored),
        directions=0 if options.forward else options.directions,
        seed=options.seed,
        groups=groups,
        seconds=seconds,
        created=now(),
        machine=machine(gpu_name(options.device)),
        versions=versions(),
    )
