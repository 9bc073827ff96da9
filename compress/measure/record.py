"""The record of a run: one versioned JSON file. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from compress.common.files import write_text_atomic
from compress.common.inputs import read_as
from compress.common.machine import Machine
from compress.measure.accuracy.statistics import Interval
from compress.measure.speed.timing import Speed
from compress.measure.vectors.fidelity import Fidelity

if TYPE_CHECKING:
    from compress.measure.accuracy.score import TaskScore

RECORD_FILE = "record.json"


class RecordPart(BaseModel):
    """A part of a record. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Model(RecordPart):
    """The model that a run started from."""

    name: str
    fingerprint: str
    architecture: str
    licence: str | None
    weights: Literal["pretrained", "random"]
    """Whether the weights are trained. If they are `random`, only sizes, speed and memory mean anything."""
    parameters: int
    dimension: int
    max_length: int


class Step(RecordPart):
    """A method as it was applied."""

    config: dict[str, Any]
    seconds: float
    note: str
    found: dict[str, Any] = {}
    """What the step found on the way; for a training, the curve and the numbers of texts it saw and left out."""


class Row(RecordPart):
    """One embedder as it was measured: a variant or a baseline, in one runtime."""

    name: str
    role: Literal["baseline", "variant"]
    runtime: str
    device: str
    compute: str
    """Dtype of the floating-point arithmetic."""
    weights: str
    activations: str
    size_bytes: int
    """Bytes of the weights on disk at this precision."""
    speed: Speed | None = None
    speedup: dict[str, float] = {}
    """Throughput relative to each baseline: the median of the rounds' ratios."""


class TaskRow(RecordPart):
    """A task's scores."""

    task: str
    type: str
    metric: str
    baseline: float
    variant: float
    prompts: dict[str, str]
    data: str
    seconds: dict[str, float]
    """Seconds to score each model, encoding included; few where vectors or scores were already in the cache."""
    interval: Interval | None = None
    """Confidence interval of the difference. None if mteb does not score single examples of such a task."""
    verdict: str | None = None
    """`kept`, `regressed` or `inconclusive`, against the recipe's margin."""
    index: dict[str, float] = {}
    """Scores of one model's queries on the other's documents, by which of the two does what."""

    @property
    def delta(self) -> float:
        """Variant minus baseline."""
        return self.variant - self.baseline


class GateResult(RecordPart):
    """A gate of the recipe, and whether it was kept."""

    name: str
    bound: float
    value: float
    kept: bool


class Estimated(RecordPart):
    """A number with its 95 % confidence interval over the examples; without one where mteb does not score single examples."""

    value: float
    low: float | None = None
    high: float | None = None

    def percent(self, digits: int = 1) -> str:
        """Return it for people, times 100: `98.9 [97.9, 99.8]`."""
        ends = "" if self.low is None or self.high is None else f" [{100 * self.low:.{digits}f}, {100 * self.high:.{digits}f}]"
        return f"{100 * self.value:.{digits}f}{ends}"


class IndexScores(RecordPart):
    """The scores of a retrieval task by who embeds the queries and who has embedded the documents."""

    task: str
    old_on_old: Estimated
    """The model that made the index, with its own queries: what users have."""
    new_on_old: Estimated
    """The aligned model's queries on that index."""
    new_on_new: Estimated
    """The new model without the map on documents of its own: what embedding everything again would give."""
    kept: Estimated
    """`new_on_old` as a share of `old_on_old`; the interval is that of the paired difference."""
    again: Estimated
    """`new_on_new` as a share of `old_on_old`."""


class Alignment(RecordPart):
    """What a model's queries find in the index of another one."""

    to: str
    """Name of the model that made the index."""
    fingerprint: str
    """Fingerprint of that model's files."""
    tasks: tuple[IndexScores, ...]
    kept: Estimated
    """Mean of `new_on_old` as a share of the mean of `old_on_old`."""
    again: Estimated
    """Mean of `new_on_new` as a share of the mean of `old_on_old`."""
    wanted: float
    """Least share that has to be kept, judged by the lower end of the interval."""
    keep_index: bool
    """Whether it is."""


class DepthRow(RecordPart):
    """A variant cut to its first blocks, against the same baseline as the whole variant."""

    depth: int
    """Number of blocks that are kept; the last row is the whole variant."""
    size_bytes: int
    """Bytes of the weights on disk."""
    cosine_mean: float | None = None
    """Mean cosine to the baseline's vectors; None if fidelity was not measured, or the widths differ."""
    overlap_at_10: float | None = None
    """Shared part of the ten nearest neighbours; None if fidelity was not measured."""
    scores: dict[str, float] = {}
    """Score on each task."""
    retained: float | None = None
    """Mean score divided by that of the baseline. None if accuracy was not measured."""
    overall: Interval | None = None
    """Confidence interval of the difference of the means, over the tasks that have an interval."""


class Record(RecordPart):
    """A whole run."""

    schema_version: Literal[1] = 1
    run: str
    created: str
    command: str
    recipe: dict[str, Any]
    """The recipe with every default filled in."""
    model: Model
    steps: tuple[Step, ...]
    baseline: str
    """Precision of the baseline's vectors and the reason for it, or the reason why nothing was compared."""
    tasks: tuple[TaskRow, ...]
    retained: float | None
    """Mean score of the variant divided by that of the baseline. None if accuracy was not measured."""
    overall: Interval | None = None
    """Confidence interval of the difference of the means, over the tasks that have an interval."""
    fidelity: Fidelity | None
    rows: tuple[Row, ...]
    measured_on: str
    alignment: Alignment | None = None
    """What the variant's queries find in another model's index; None: it was not aligned to one by `compress align`."""
    depths: tuple[DepthRow, ...] = ()
    """What the variant keeps at each depth to which it was trained to be cut; empty if it was not, or nothing was compared."""
    gates: tuple[GateResult, ...]
    verdict: str
    machine: Machine
    versions: dict[str, str]
    seed: int

    def write(self, folder: Path) -> None:
        """Write `record.json` atomically. A record that was read is written as it was, without the keys that it lacked."""
        kept = {"schema_version": self.schema_version} | self.model_dump(mode="json", exclude_unset=True)
        write_text_atomic(folder / RECORD_FILE, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a run's record.

        Raises:
            UserError: there is none, or it does not fit this schema.
        """
        return read_as(folder / RECORD_FILE, cls)

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)


def task_row(baseline: TaskScore, variant: TaskScore, interval: Interval | None, index: Mapping[str, float]) -> TaskRow:
    """Build the row of a task."""
    return TaskRow(
        task=variant.task,
        type=baseline.type,
        metric=baseline.metric,
        baseline=baseline.score,
        variant=variant.score,
        prompts=baseline.prompts,
        data=baseline.data,
        seconds={"baseline": baseline.seconds, "variant": variant.seconds},
        interval=interval,
        verdict=interval.verdict if interval else None,
        index=dict(index),
    )
