"""Makes a variant: cuts a recipe's steps into stages, each of which is one walk over the model's segments (`stage`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.common.journal import Journal
from compress.methods import method_class
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.pipeline.stage import BuildOptions, Stage, write_stage


def stages_of(steps: Sequence[Method]) -> list[list[Method]]:
    """Cut steps into stages. A step that looks at the whole model, after one that works segment by segment, starts a new stage."""
    stages: list[list[Method]] = [[]]
    for step in steps:
        if step.whole and any(not before.whole for before in stages[-1]):
            stages.append([])
        stages[-1].append(step)
    return stages


def make_variant(
    source: ModelFolder, shape: ModelShape, steps: Sequence[Method], target: Path, journal: Journal, options: BuildOptions
) -> list[dict[str, Any]]:
    """Write the variant of a model.

    Every segment is kept as soon as it is done, and so are the hidden states of the calibration texts after it. A call that was
    killed continues after the last segment it finished.

    Args:
        source: the model.
        shape: its shape.
        steps: the methods, in the order in which they are applied.
        target: folder of the variant; it appears once the variant is complete.
        journal: keeps what is known of the segments that are done.
        options: calibration texts, device, runtime and the like.

    Returns:
        For each step: its `config`, the `seconds` it took, a `note` on what it did, and what it `found` on the way.

    Raises:
        UserError: a step does not fit the model, or a weight is not finite in float16.
    """
    published = source
    stages, done = stages_of(steps), list[dict[str, Any]]()
    for number, stage in enumerate(stages[:-1]):
        own = Journal(journal.folder / f"stage-{number}")
        between = own.folder / "variant"
        part = Stage(source, shape, stage, len(done), between, own, published, options)
        made = own.once("done", partial(_write, part))["steps"]
        for entry in made:
            step = method_class(entry["config"]["method"]).model_validate_json(json.dumps(entry["config"]))
            shape = step.estimate(shape).after
        done += made
        source = ModelFolder(source.name, between)
    return done + write_stage(Stage(source, shape, stages[-1], len(done), target, journal, published, options))


def _write(stage: Stage) -> dict[str, Any]:
    return {"steps": write_stage(stage)}
