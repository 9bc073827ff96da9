"""What the page is told of runs: the comparison's lines, and what of each record its charts show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.common.machine import now
from compress.measure.record import Record
from compress.reports.compare import Group, grouped, read_records

# What a step does to a model, by its method; a run's family is what its steps do, in this order.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "smaller": ("depth", "width", "vocabulary", "latents", "mean_pooling"),
    "sparse": ("magnitude", "wanda", "sparsegpt"),
    "distilled": ("distill",),
    "quantized": ("rtn", "gptq", "awq", "smoothquant", "fp8", "bitsandbytes", "embeddings"),
}


def family(methods: Sequence[str]) -> str:
    """Say what a run's steps did, in few words; `as it was` where they changed no number (the fold, or nothing)."""
    found = [name for name, members in FAMILIES.items() if any(method in members for method in methods)]
    return " + ".join(found) or "as it was"


def payload(places: Sequence[Path]) -> dict[str, Any]:
    """Read records and return what the page shows of them; what cannot be read is listed with its reason.

    Raises:
        UserError: there is not one readable record.
    """
    records, broken = read_records(places)
    found = grouped(records.values())
    by_run = {record.run: record for record in records.values()}
    groups = [{key: value for key, value in asdict(group).items() if key != "lines"} | {"title": group.title} for group in found]
    return {"generated": now(), "groups": groups, "runs": _runs(found, by_run), "broken": broken}


def _runs(groups: Sequence[Group], records: Mapping[str, Record]) -> list[dict[str, Any]]:
    return [
        asdict(line) | _details(records[line.run]) | {"group": number}
        for number, group in enumerate(groups)
        for line in group.lines
    ]


def _details(record: Record) -> dict[str, Any]:
    methods = [str(step.config["method"]) for step in record.steps]
    speed = record.row("variant").speed
    return {
        "model": record.model.name,
        "machine": record.machine.gpu or f"{record.machine.cores} cores of {record.machine.cpu}",
        "methods": methods,
        "family": family(methods),
        "p99_ms": speed.latency_p99_ms if speed else None,
        "loaded_bytes": speed.loaded_bytes if speed else None,
        "record": record.model_dump(mode="json"),
    }
