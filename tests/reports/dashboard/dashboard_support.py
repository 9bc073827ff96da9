"""Results of others and sensitivities, made for the tests of the dashboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.measure.record import Record
from compress.measure.sensitivity import GroupScores, Sensitivity

RESULTS = Path(__file__).parents[3] / "results"
RUN = "int8-minilm-69839f2b"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def mteb_result(task: str, *scores: float, metric: str = "accuracy", split: str = "test") -> dict[str, Any]:
    """A result as mteb 2.26 writes it, with a subset for each score."""
    subsets = [
        {"main_score": score, metric: score, "hf_subset": f"s{number}", "languages": ["eng-Latn"]}
        for number, score in enumerate(scores)
    ]
    return {
        "dataset_revision": "1", "task_name": task, "mteb_version": "2.26.24", "scores": {split: subsets}, "evaluation_time": 1.0, "kg_co2_emissions": None,
    }  # fmt: skip


def sensitivity(fingerprint: str, created: str = "2026-11-28") -> Sensitivity:
    """Two blocks with two kinds of layers and a table, and two choices."""
    record = Record.read(RESULTS / RUN)
    groups = [
        GroupScores(
            name=f"{block}.{kind}", block=block, kind=kind, layers=(f"{block}.{kind}",), parameters=4,
            losses={"int8": 1e-6 * (1 + number), "int4": 1e-3 * (1 + number)}, bytes={"int8": 4, "int4": 2},
        )
        for number, (block, kind) in enumerate([(0, "qkv"), (0, "mlp"), (1, "qkv"), (1, "mlp"), (None, "table")])
    ]  # fmt: skip
    return Sensitivity(
        model="minilm", fingerprint=fingerprint, how="derivatives", runtime="torch", calibrated=8, scored=16, directions=2, seed=0,
        groups=tuple(groups), seconds=1.0, created=created, machine=record.machine, versions={},
    )  # fmt: skip
