"""The data of the dashboard's page: the lines of the comparison, and the parts of each record that its charts show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from compress.common.machine import now
from compress.measure.record import Record
from compress.methods import method_class, method_names
from compress.methods.base import FAMILIES, UNCHANGED
from compress.reports.compare import Group, grouped, read_records
from compress.reports.dashboard.imported import read_imported
from compress.reports.dashboard.placing import placed
from compress.reports.dashboard.sensitivities import read_sensitivities


def family(methods: Sequence[str]) -> str:
    """Say in a few words what a run's steps did; `as it was` where no step changed what the model computes (the fold, or no step).

    Each method says its family itself. A method of a package that is not installed here is shown by its own name.
    """
    known = set(method_names())
    found = {method_class(name).family if name in known else name for name in methods} - {UNCHANGED}
    return (
        " + ".join(sorted(found, key=lambda name: (FAMILIES.index(name) if name in FAMILIES else len(FAMILIES), name))) or UNCHANGED
    )


def payload(places: Sequence[Path], imports: Sequence[Path] = ()) -> dict[str, Any]:
    """Read records and return what the page shows of them; what cannot be read is listed with the reason.

    Args:
        places: runs, or folders of runs.
        imports: folders with other people's results, of mteb or HAKARI-Bench.

    Raises:
        UserError: no record can be read.
    """
    records, broken = read_records(places)
    found = grouped(records.values())
    by_run = {record.run: record for record in records.values()}
    groups = [{key: value for key, value in asdict(group).items() if key != "lines"} | {"title": group.title} for group in found]
    imported, not_imported = read_imported(imports)
    more, sets = placed(imported, found, [by_run[group.lines[0].run].tasks for group in found])
    known, not_read = read_sensitivities(places, {record.model.fingerprint for record in by_run.values()})
    return {
        "generated": now(),
        "groups": groups + sets,
        "runs": _runs(found, by_run) + more,
        "sensitivities": known,
        "broken": broken | not_imported | not_read,
    }


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
        "mean": mean(task.variant for task in record.tasks) if record.tasks else None,
        "imported": None,
        "p99_ms": speed.latency_p99_ms if speed else None,
        "loaded_bytes": speed.loaded_bytes if speed else None,
        "record": record.model_dump(mode="json"),
    }
