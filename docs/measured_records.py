"""What the records under results/ say, and what a mark in the pages may name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from compress.measure.record import Record
from compress.reports.compare import Line, line_of
from compress.reports.formats import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
HASH = re.compile(r"-[0-9a-f]{8}$")


class StaleError(Exception):
    """A mark that names no record, no key, or another number."""


def run_folder(name: str) -> Path:
    """Return a run's folder by its whole name, or by the name without the hash where one run alone has it."""
    if (RESULTS / name / "record.json").exists():
        return RESULTS / name
    found = [path.parent for path in RESULTS.glob(f"{name}-*/record.json") if HASH.sub("", path.parent.name) == name]
    if len(found) != 1:
        raise StaleError(f"{name!r} names {len(found)} runs under results/")
    return found[0]


@cache
def raw(name: str) -> dict[str, Any]:
    """Return a run's record as plain JSON."""
    data: dict[str, Any] = json.loads((run_folder(name) / "record.json").read_text(encoding="utf-8"))
    return data


@cache
def line(name: str) -> Line:
    """Return a run as `compress compare` shows it."""
    return line_of(Record.read(run_folder(name)))


@cache
def peers(file: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a comparison with other libraries, by name, slowest first."""
    rows = json.loads((RESULTS / "peers-cpu" / file).read_text(encoding="utf-8"))["rows"]
    return {row["name"]: row for row in sorted(rows, key=lambda row: row["ratio"])}


def present(value: float | None) -> float:
    """Return a value that the record has to hold."""
    if value is None:
        raise StaleError("the record does not hold this value")
    return value


def training_minutes(name: str) -> float:
    """Return how long distillation took, in minutes, summed over its stages and continuations."""
    stages = [step for step in raw(name)["steps"] if step["config"]["method"] == "distill"]
    return sum(stage["found"]["curve"][-1]["seconds"] for stage in stages) / 60


def recovered(healed: str, pruned: str) -> float:
    """Return which share of the loss of `pruned` training has given back, in percent."""
    after, before = present(line(healed).kept), present(line(pruned).kept)
    return 100 * (after - before) / (1 - before)


def index_score(run: str, task: str, way: str) -> float:
    """Return the score where one model's queries search the other's documents, such as `variant queries on baseline documents`."""
    return next(100 * row["index"][way.replace(" on ", ", ")] for row in raw(run)["tasks"] if row["task"] == task)


def peer_ratio(key: str, file: str = "peers.json") -> Callable[[str, str], float]:
    """Return a function that divides one row's value by another's."""
    return lambda ours, theirs: peers(file)[ours][key] / peers(file)[theirs][key]


VALUES: Mapping[str, Callable[..., float | str]] = {
    "kept": lambda run: 100 * present(line(run).kept),
    "loss": lambda run: 100 - 100 * present(line(run).kept),
    "interval": lambda run: COLUMNS["95 % interval"](line(run)),
    "faster": lambda run: present(line(run).speedup),
    "file": lambda run: line(run).bytes / 1e6,
    "cosine": lambda run: present(line(run).cosine),
    "cosine loss": lambda run: 1 - present(line(run).cosine),
    "p50": lambda run: present(line(run).latency_ms),
    "p50 of float32": lambda run: next(r for r in raw(run)["rows"] if r["name"] == "float32")["speed"]["latency_p50_ms"],
    "minutes": training_minutes,
    "recovered": recovered,
    "smaller than float32": lambda run: 4 * raw(run)["model"]["parameters"] / line(run).bytes,
    "baseline": lambda run: 100 * mean(task["baseline"] for task in raw(run)["tasks"]),
    "score": lambda run, task: next(100 * t["variant"] for t in raw(run)["tasks"] if t["task"] == task),
    "index": lambda run, task, way: next(
        100 * t["index"][way.replace(" on ", ", ")] for t in raw(run)["tasks"] if t["task"] == task
    ),
    "peers": peer_ratio("ratio"),
    "peers memory": lambda ours, theirs: 100 * peer_ratio("peak_bytes")(ours, theirs),
}
"""What a mark may name: percent, MB, ms, minutes or a ratio, as the key says."""
