"""Turns what a run found into its record: rows, gates, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.common.machine import gpu_name, machine, now, versions
from compress.measure.accuracy.statistics import Interval, PairedComparison
from compress.measure.record import GateResult, Model, Record, Row, Step, TaskRow, task_row
from compress.measure.speed.timing import Speed, speed_ratio
from compress.measure.vectors.fidelity import Fidelity
from compress.models.files.headers import weight_bytes
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.models.source import DTYPE_BYTES
from compress.pipeline.recipe import Gates, Recipe

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore

VARIANT = "variant"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Findings:
    """What a run found."""

    steps: tuple[Step, ...]
    baseline: str
    """Precision of the baseline's vectors, and why."""
    scores: Mapping[str, Mapping[str, TaskScore]]
    """Scores by task, then by role (`baseline`, `variant`)."""
    index: Mapping[str, Mapping[str, float]]
    """Scores of one model's queries on the other's documents, by retrieval task, then by which of the two does what."""
    agreement: Fidelity | None
    speeds: Mapping[str, Speed]
    """Speed of each baseline, by dtype, and of the `variant`; gates look at the first baseline. Empty if speed was not measured."""


def assemble(
    name: str, recipe: Recipe, source: ModelFolder, shape: ModelShape, folder: Path, device: str, found: Findings
) -> Record:
    """Build a run's record; `folder` holds its variant."""
    info = ModelFolder(name, folder / VARIANT).compressed
    compared = _compare(recipe, found)
    tasks = tuple(
        task_row(roles["baseline"], roles[VARIANT], compared.tasks[name], found.index.get(name, {}))
        for name, roles in found.scores.items()
    )
    retained = float(np.mean([task.variant for task in tasks]) / np.mean([task.baseline for task in tasks])) if tasks else None
    rows = _rows(recipe, info, shape, folder, device, found.speeds)
    gates, unjudged = _gates(recipe.gates, _retained_at_least(retained, tasks, compared.overall), found.agreement, rows[-1], shape)
    return Record(
        run=name,
        created=now(),
        # The run's folder has its own copy of the recipe, with every default and every command-line option filled in.
        command=f"compress run {RECIPE_FILE}",
        recipe=recipe.model_dump(mode="json"),
        model=Model(
            name=source.name,
            fingerprint=info.base_fingerprint,
            architecture=str(shape.config.get("model_type")),
            licence=info.licence,
            weights="pretrained" if info.pretrained else "random",
            parameters=shape.parameters,
            dimension=info.spec.dimension(shape.output_width),
            max_length=info.max_length,
        ),
        steps=found.steps,
        baseline=found.baseline,
        tasks=tasks,
        retained=retained,
        overall=compared.overall,
        fidelity=found.agreement,
        rows=rows,
        measured_on=f"{recipe.measure.count} texts from {recipe.measure.texts}, {recipe.measure.rounds} rounds",
        gates=gates,
        verdict=_verdict(retained, compared.overall, gates, unjudged),
        machine=machine(gpu_name(device)),
        versions=versions(),
        seed=recipe.seed,
    )


def _compare(recipe: Recipe, found: Findings) -> PairedComparison:
    if not found.scores:
        return PairedComparison({}, None)
    from compress.measure.accuracy.paired import compare_scores  # imports mteb, and nothing was scored where it is not

    baseline, variant = ({name: roles[role] for name, roles in found.scores.items()} for role in ("baseline", VARIANT))
    return compare_scores(baseline, variant, recipe.evaluate.margin, seed=recipe.seed)


def _retained_at_least(retained: float | None, tasks: Sequence[TaskRow], overall: Interval | None) -> float | None:
    """Return the retained share of the mean score at the lower end of its interval; the share itself if there is no interval."""
    if retained is None or overall is None:
        return retained
    judged = [task.baseline for task in tasks if task.interval is not None]
    return 1 + overall.low / float(np.mean(judged))


def _rows(
    recipe: Recipe, info: VariantInfo, shape: ModelShape, folder: Path, device: str, speeds: Mapping[str, Speed]
) -> tuple[Row, ...]:
    """Build a row for each measured embedder; the variant comes last."""
    baselines = [name for name in speeds if name != VARIANT]
    rows = []
    for name in (*baselines, VARIANT):
        is_variant = name == VARIANT
        rows.append(
            Row(
                name=name,
                role="variant" if is_variant else "baseline",
                runtime=info.runtime if is_variant else "torch",
                device=device,
                compute=(info.dtype or ("float32" if device == "cpu" else "float16")) if is_variant else name,
                weights=info.weights if is_variant else name,
                activations=info.activations if is_variant else "none",
                size_bytes=weight_bytes(folder / VARIANT) if is_variant else shape.parameters * DTYPE_BYTES[name],
                speed=speeds[name] if speeds else None,
                speedup={other: speed_ratio(speeds[name], speeds[other]) for other in baselines if other != name},
            )
        )
    return tuple(rows)


def _gates(
    gates: Gates, retained: float | None, agreement: Fidelity | None, variant: Row, shape: ModelShape
) -> tuple[tuple[GateResult, ...], list[str]]:
    """Judge the gates. Also return the names of those whose value was not measured."""
    values = {
        "retained": retained,
        "cosine_mean": agreement.cosine_mean if agreement else None,
        "overlap_at_10": agreement.overlap_at_10 if agreement else None,
        "speedup": next(iter(variant.speedup.values()), None),
        "size_ratio": variant.size_bytes / shape.half_bytes,
    }
    results, unjudged = [], []
    for name, bound in gates.model_dump(exclude_none=True).items():
        value = values[name]
        if value is None:
            unjudged.append(name)
            continue
        kept = value <= bound if name == "size_ratio" else value >= bound
        results.append(GateResult(name=name, bound=bound, value=value, kept=kept))
    return tuple(results), unjudged


def _verdict(retained: float | None, overall: Interval | None, gates: Sequence[GateResult], unjudged: Sequence[str]) -> str:
    """Summarize the result in one sentence."""
    missed = [gate.name for gate in gates if not gate.kept]
    said = ["accuracy not measured" if retained is None else f"{100 * retained:.2f} % of the baseline's mean score"]
    if overall is not None:
        said.insert(0, f"{overall.verdict} within a margin of {100 * overall.margin:.2f} points")
    if missed:
        said.append(f"misses {', '.join(missed)}")
    elif gates:
        said.append(f"all {len(gates)} gates passed" if not unjudged else f"passes {', '.join(gate.name for gate in gates)}")
    if unjudged:
        said.append(f"not judged: {', '.join(unjudged)}")
    elif not gates:
        said.append("the recipe sets no gates")
    return "; ".join(said)
