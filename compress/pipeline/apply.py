"""Makes a variant: cuts a recipe's steps into stages, each of which is one walk over the model's segments (`stage`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.methods import method_class
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.pipeline.stage import Making, write_stage

if TYPE_CHECKING:
    pass


def stages_of(steps: Sequence[Method]) -> list[list[Method]]:
    """Cut steps where one that looks at the model whole follows one that goes segment by segment: what is cut shares a walk."""
    stages: list[list[Method]] = [[]]
    for step in steps:
        if step.whole and any(not before.whole for before in stages[-1]):
            stages.append([])
        stages[-1].append(step)
    return stages


def make_variant(
    source: ModelFolder,
    shape: ModelShape,
    steps: Sequence[Method],
    fingerprint: str,
    target: Path,
    journal: Journal,
    say: Callable[[str], None],
    calibration: CalibrationSource | None = None,
    device: str = "cpu",
    runtime: str = "torch",
    dtype: str | None = None,
    evaluated: Callable[[], frozenset[str]] = frozenset,
) -> list[dict[str, Any]]:
    """Write the variant of a model.

    Every segment is kept as it is done, and so are the calibration texts' hidden states behind it; a call that follows one that was
    killed goes on behind the last of them.

    Args:
        source: the model.
        shape: its shape.
        steps: the methods, in the order of their application.
        fingerprint: of the model's files.
        target: the variant's folder; it appears when it is whole.
        journal: keeps what is known of the segments that are done.
        say: told each step once it has seen all segments.
        calibration: for steps that calibrate: they are shown a segment's inputs as the segments before it, compressed, make them.
        device: where the segments are worked on.
        runtime: what the variant is made for.
        dtype: of the floating-point arithmetic there; None: its default.
        evaluated: returns the texts that nothing may be trained on; see `Bench`.

    Returns:
        For each step its `config`, the `seconds` it took, a `note` on what it did, and what it `found` on its way.

    Raises:
        UserError: a weight is not finite, or does not fit float16.
    """
    making = Making(source, fingerprint, say, calibration, device, runtime, dtype, evaluated)
    stages, done = stages_of(steps), list[dict[str, Any]]()
    for number, stage in enumerate(stages[:-1]):
        own = Journal(journal.folder / f"stage-{number}")
        between = own.folder / "variant"
        made = own.once("done", partial(_staged, making, source, shape, stage, len(done), between, own))["steps"]
        for entry in made:
            step = method_class(entry["config"]["method"]).model_validate_json(json.dumps(entry["config"]))
            shape = step.estimate(shape).after
        done += made
        source = ModelFolder(source.name, between)
    return done + write_stage(making, source, shape, stages[-1], len(done), target, journal)


def _staged(making: Making, *arguments: Any) -> dict[str, Any]:
    return {"steps": write_stage(making, *arguments)}
