"""Turns what a run found into its record: rows, gates, verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.common.machine import gpu_name, machine, now, versions
from compress.measure.accuracy.statistics import Interval, PairedComparison
from compress.measure.record import DepthRow, GateResult, Model, Record, Row, Step, TaskRow, task_row
from compress.measure.speed.timing import Speed, speed_ratio
from compress.measure.vectors.fidelity import Fidelity
from compress.models.files.headers import weight_bytes
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.models.source import DTYPE_BYTES
from compress.pipeline.recipe import Gates, Recipe
from compress.runtimes.loading import runtime_of

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore

VARIANT = "variant"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class CutFindings:
    """What was measured of a variant cut to its first blocks."""

    depth: int
    size_bytes: int
    scores: Mapping[str, TaskScore]
    """Scores by task."""
    agreement: Fidelity | None

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> CutFindings:
        """Return it as the journal kept it."""
        scores: dict[str, TaskScore] = {}
        if kept["scores"]:
            from compress.measure.accuracy.score import TaskScore  # imports mteb

            scores = {name: TaskScore(**score) for name, score in kept["scores"].items()}
        agreement = Fidelity(**kept["agreement"]) if "agreement" in kept else None
        return cls(kept["depth"], kept["size_bytes"], scores, agreement)

    def retained(self, baseline: Mapping[str, TaskScore]) -> float | None:
        """Return the mean score as a share of the baseline's, whose scores are given by task; None if there are none."""
        if not self.scores:
            return None
        return sum(score.score for score in self.scores.values()) / sum(baseline[name].score for name in self.scores)

    def in_short(self, baseline: Mapping[str, TaskScore]) -> str:
        """Say it in a line."""
        retained = self.retained(baseline)
        said = [] if retained is None else [f"{100 * retained:.2f} % of the baseline's mean score"]
        said += [] if self.agreement is None else [self.agreement.in_short()]
        return "; ".join(said)


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
    cuts: Sequence[CutFindings] = ()
    """What was measured of the variant cut to each shallower depth that it was trained for."""


def assemble(
    name: str, recipe: Recipe, source: ModelFolder, shape: ModelShape, folder: Path, device: str, found: Findings
) -> Record:
    """Build a run's record; `folder` holds its variant."""
    info = ModelFolder(name, folder / VARIANT).compressed
    baseline, variant = ({task: roles[role] for task, roles in found.scores.items()} for role in ("baseline", VARIANT))
    compared = _compare(recipe, baseline, variant)
    tasks = tuple(
        task_row(roles["baseline"], roles[VARIANT], compared.tasks[name], found.index.get(name, {}))
        for name, roles in found.scores.items()
    )
    retained = float(np.mean([task.variant for task in tasks]) / np.mean([task.baseline for task in tasks])) if tasks else None
    rows = _rows(source, info, shape, folder, device, found.speeds)
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
            dimension=source.dimension,
            max_length=info.max_length,
        ),
        steps=found.steps,
        baseline=found.baseline,
        tasks=tasks,
        retained=retained,
        overall=compared.overall,
        fidelity=found.agreement,
        **({"depths": _depths(info, folder, recipe, found)} if found.cuts else {}),
        rows=rows,
        measured_on=f"{recipe.measure.count} texts from {recipe.measure.texts}, {recipe.measure.rounds} rounds",
        gates=gates,
        verdict=_verdict(retained, compared.overall, gates, unjudged),
        machine=machine(gpu_name(device)),
        versions=versions(),
        seed=recipe.seed,
    )


def _depths(info: VariantInfo, folder: Path, recipe: Recipe, found: Findings) -> tuple[DepthRow, ...]:
    """Build a row for each depth that the variant was trained to be cut to; the whole variant comes last."""
    scores = {name: roles[VARIANT] for name, roles in found.scores.items()}
    whole = CutFindings(max(info.depths), weight_bytes(folder / VARIANT), scores, found.agreement)
    baseline = {name: roles["baseline"] for name, roles in found.scores.items()}
    return tuple(
        DepthRow(
            depth=cut.depth,
            size_bytes=cut.size_bytes,
            cosine_mean=cut.agreement.cosine_mean if cut.agreement else None,
            overlap_at_10=cut.agreement.overlap_at_10 if cut.agreement else None,
            scores={name: score.score for name, score in cut.scores.items()},
            retained=cut.retained(baseline),
            overall=_compare(recipe, baseline, cut.scores).overall,
        )
        for cut in (*found.cuts, whole)
    )


def _compare(recipe: Recipe, baseline: Mapping[str, TaskScore], variant: Mapping[str, TaskScore]) -> PairedComparison:
    if not baseline:
        return PairedComparison({}, None)
    from compress.measure.accuracy.paired import compare_scores  # imports mteb, and nothing was scored where it is not

    return compare_scores(baseline, variant, recipe.evaluate.margin, seed=recipe.seed)


def _retained_at_least(retained: float | None, tasks: Sequence[TaskRow], overall: Interval | None) -> float | None:
    """Return the retained share of the mean score at the lower end of its interval; the share itself if there is no interval."""
    if retained is None or overall is None:
        return retained
    judged = [task.baseline for task in tasks if task.interval is not None]
    return 1 + overall.low / float(np.mean(judged))


def _rows(
    source: ModelFolder, info: VariantInfo, shape: ModelShape, folder: Path, device: str, speeds: Mapping[str, Speed]
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
                runtime=info.runtime if is_variant else runtime_of(source, device=device, dtype=name),
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
