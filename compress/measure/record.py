"""The record of a run: one versioned JSON file. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.common.errors import UserError
from compress.common.files import write_text_atomic
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
        path = folder / RECORD_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (UnicodeDecodeError, RecursionError) as error:
            raise UserError(f"{path}: is no record ({error})") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

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
