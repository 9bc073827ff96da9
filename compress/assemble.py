"""From what a run found to its record: rows, gates, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.loading import Source
from compress.measure.fidelity import Fidelity
from compress.measure.speed import Speed, speed_ratio
from compress.models.checkpoint import weight_bytes
from compress.models.shape import ModelShape
from compress.models.variant import VariantInfo
from compress.recipe import Gates, Recipe
from compress.record import GateResult, Model, Record, Row, Step, TaskRow, machine, now, versions

VARIANT = "variant"
RECIPE_FILE = "recipe.yaml"
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Findings:
    """What a run found, part by part."""

    steps: tuple[Step, ...]
    baseline: str
    """Precision of the baseline's vectors, and why."""
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """By task, then by role (`baseline`, `variant`)."""
    agreement: Fidelity
    speeds: Mapping[str, Speed]
    """Baselines by dtype, the first being the one that gates look at, and `variant`."""


def assemble(name: str, recipe: Recipe, source: Source, shape: ModelShape, folder: Path, device: str, found: Findings) -> Record:
    """Put a run's record together; `folder` holds its variant."""
    info = VariantInfo.read(folder / VARIANT)
    tasks = tuple(_task_row(task, roles["baseline"], roles[VARIANT]) for task, roles in found.scores.items())
    retained = float(np.mean([task.variant for task in tasks]) / np.mean([task.baseline for task in tasks]))
    rows = _rows(recipe, info, shape, folder, device, found.speeds)
    gates = _gates(recipe.gates, retained, found.agreement, rows[-1], shape)
    return Record(
        run=name,
        created=now(),
        # The run's own copy of the recipe, in which every default and every option of the command is filled in.
        command=f"compress run {RECIPE_FILE}",
        recipe=recipe.model_dump(mode="json"),
        model=Model(
            name=source.name,
            fingerprint=info.base_fingerprint,
            architecture=str(shape.config.get("model_type")),
            licence=info.licence,
            weights="pretrained",
            parameters=shape.parameters,
            dimension=shape.hidden_size,
            max_length=info.max_length,
        ),
        steps=found.steps,
        baseline=found.baseline,
        tasks=tasks,
        retained=retained,
        fidelity=found.agreement.model_dump(mode="json"),
        rows=rows,
        measured_on=f"{recipe.measure.count} texts from {recipe.measure.texts}, {recipe.measure.rounds} rounds",
        gates=gates,
        verdict=_verdict(retained, gates),
        machine=machine(gpu_name(device)),
        versions=versions(),
        seed=recipe.seed,
    )


def _task_row(name: str, baseline: Mapping[str, Any], variant: Mapping[str, Any]) -> TaskRow:
    return TaskRow(
        task=name,
        type=baseline["type"],
        metric=baseline["metric"],
        baseline=baseline["score"],
        variant=variant["score"],
        prompts=baseline["prompts"],
        data=baseline["data"],
        seconds={"baseline": baseline["seconds"], "variant": variant["seconds"]},
    )


def _rows(
    recipe: Recipe, info: VariantInfo, shape: ModelShape, folder: Path, device: str, speeds: Mapping[str, Speed]
) -> tuple[Row, ...]:
    """Make a row of each measured embedder, the variant's last."""
    baselines = [name for name in speeds if name != VARIANT]
    rows = []
    for name in (*baselines, VARIANT):
        is_variant = name == VARIANT
        rows.append(
            Row(
                name=name,
                role="variant" if is_variant else "baseline",
                runtime=recipe.runtime,
                device=device,
                compute=("float32" if device == "cpu" else "float16") if is_variant else name,
                weights=info.weights if is_variant else name,
                activations=info.activations if is_variant else "none",
                size_bytes=weight_bytes(folder / VARIANT) if is_variant else shape.parameters * BYTES[name],
                speed=speeds[name].model_dump(mode="json"),
                speedup={other: speed_ratio(speeds[name], speeds[other]) for other in baselines if other != name},
            )
        )
    return tuple(rows)


def _gates(gates: Gates, retained: float, agreement: Fidelity, variant: Row, shape: ModelShape) -> tuple[GateResult, ...]:
    values = {
        "retained": retained,
        "cosine_mean": agreement.cosine_mean,
        "overlap_at_10": agreement.overlap_at_10,
        "speedup": next(iter(variant.speedup.values())),
        "size_ratio": variant.size_bytes / shape.half_bytes,
    }
    results = []
    for name, bound in gates.model_dump(exclude_none=True).items():
        kept = values[name] <= bound if name == "size_ratio" else values[name] >= bound
        results.append(GateResult(name=name, bound=bound, value=values[name], kept=kept))
    return tuple(results)


def _verdict(retained: float, gates: Sequence[GateResult]) -> str:
    """Say in a sentence what came out."""
    missed = [gate.name for gate in gates if not gate.kept]
    kept = f"{100 * retained:.2f} % of the baseline's mean score kept"
    if missed:
        return f"{kept}; misses {', '.join(missed)}"
    return f"{kept}; all {len(gates)} gates passed" if gates else f"{kept}; the recipe sets no gates"


def gpu_name(device: str) -> str | None:
    """Return the name of the accelerator that a device is, or None for a CPU."""
    if device == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_name(device))
