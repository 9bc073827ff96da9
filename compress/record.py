"""What a run leaves behind: one versioned JSON record, and the journal of a run that is under way. No torch here."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import UserError
from compress.measure.statistics import Interval
from compress.memory import memory_bytes
from compress.models.checkpoint import write_text_atomic
from compress.processor import cpu_flags, cpu_name

RECORD_FILE = "record.json"
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "mteb",
    "sentence-transformers",
    "scikit-learn",
    "numpy",
    "onnxruntime",
    "openvino",
)


class Part(BaseModel):
    """A part of a record."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Machine(Part):
    """Where the numbers come from."""

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    """Instruction sets that integer and half-precision products depend on."""
    memory_bytes: int
    gpu: str | None
    system: str


class Model(Part):
    """The model that a run started from."""

    name: str
    fingerprint: str
    architecture: str
    licence: str | None
    weights: Literal["pretrained", "random"]
    """`random`: only sizes, speed and memory mean anything."""
    parameters: int
    dimension: int
    max_length: int


class Step(Part):
    """A method as it was applied."""

    config: dict[str, Any]
    seconds: float
    note: str
    found: dict[str, Any] = {}
    """What it found on its way: of a training the curve, and how many texts it saw and left out."""


class Row(Part):
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
    speed: dict[str, Any] | None = None
    speedup: dict[str, float] = {}
    """Throughput relative to each baseline, median of the rounds' ratios."""


class TaskRow(Part):
    """A task's scores."""

    task: str
    type: str
    metric: str
    baseline: float
    variant: float
    prompts: dict[str, str]
    data: str
    seconds: dict[str, float]
    """Of scoring, encoding included; small where vectors or scores were at hand already."""
    interval: Interval | None = None
    """Of the difference; None where the examples of such a task are not told apart."""
    verdict: str | None = None
    """`kept`, `regressed` or `inconclusive`, against the recipe's margin."""
    index: dict[str, float] = {}
    """Scores where one model's queries search the other's documents, by which."""

    @property
    def delta(self) -> float:
        """Variant minus baseline."""
        return self.variant - self.baseline


class GateResult(Part):
    """A bound of the recipe, and whether it was kept."""

    name: str
    bound: float
    value: float
    kept: bool


class Record(Part):
    """A run, whole."""

    schema_version: Literal[1] = 1
    run: str
    created: str
    command: str
    recipe: dict[str, Any]
    """As resolved: every default filled in."""
    model: Model
    steps: tuple[Step, ...]
    baseline: str
    """Precision of the baseline's vectors, and why; or why nothing was compared with it."""
    tasks: tuple[TaskRow, ...]
    retained: float | None
    """Mean score of the variant over that of the baseline; None where accuracy was not measured."""
    overall: Interval | None = None
    """Of the difference of the mean over the tasks that have an interval."""
    fidelity: dict[str, Any] | None
    rows: tuple[Row, ...]
    measured_on: str
    gates: tuple[GateResult, ...]
    verdict: str
    machine: Machine
    versions: dict[str, str]
    seed: int

    def write(self, folder: Path) -> None:
        """Write `record.json`, whole or not at all."""
        write_text_atomic(folder / RECORD_FILE, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a run's record.

        Raises:
            UserError: there is none, or it is not of this schema.
        """
        path = folder / RECORD_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def row(self, name: str) -> Row:
        """Return the row of that name."""
        return next(row for row in self.rows if row.name == name)


class Journal:
    """Keeps the finished parts of a run on disk, so that a run that was stopped goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def once(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what `make` returned the first time, now or in an earlier process; kept as JSON under `key`."""
        if not self.has(key):
            self.put(key, make())
        return self.get(key)

    def has(self, key: str) -> bool:
        """Whether something is kept under `key`."""
        return self._path(key).exists()

    def get(self, key: str) -> dict[str, Any]:
        """Return what is kept under `key`."""
        kept: dict[str, Any] = json.loads(self._path(key).read_text(encoding="utf-8"))
        return kept

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Keep `value` under `key`, in the place of what was there."""
        write_text_atomic(self._path(key), json.dumps(value))

    def _path(self, key: str) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '-', key)}.json"


def now() -> str:
    """Return the time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def machine(gpu: str | None) -> Machine:
    """Describe this machine; `gpu` is the name of the accelerator in use, if any."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        instructions=tuple(flag for flag in wanted if flag in cpu_flags()),
        memory_bytes=memory_bytes(),
        gpu=gpu,
        system=f"{platform.system()} {platform.machine()}",
    )
