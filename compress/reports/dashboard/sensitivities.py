"""Sensitivities for the page: those that lie with the runs as files, and those of the runs' models in the cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from compress.common.cache import cache_root
from compress.common.errors import UserError
from compress.common.inputs import checked
from compress.common.journal import read_entry
from compress.measure.sensitivity import SUFFIX, Sensitivity

CACHED = "sensitivity/*/record.json"


def read_sensitivities(places: Sequence[Path], fingerprints: Collection[str]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Read sensitivities.

    Args:
        places: runs, or folders of runs; files that end with `.sensitivity.json` are read in both.
        fingerprints: models whose sensitivities are looked for in the cache. A cached one that is also a file is not repeated.

    Returns:
        What the page shows of each, and for each file that could not be read the reason.
    """
    found: dict[str, Sensitivity] = {}
    broken: dict[str, str] = {}
    for place in places:
        for path in sorted([*place.glob(f"*{SUFFIX}"), *place.glob(f"*/*{SUFFIX}")]):
            try:
                record = Sensitivity.read(path)
                found.setdefault(_same(record), record)
            except UserError as error:
                broken[str(path)] = error.message
    for path in sorted(cache_root().glob(CACHED)):
        try:
            record = checked(read_entry(path), Sensitivity, str(path))
        except UserError as error:
            broken[str(path)] = error.message
        except FileNotFoundError:  # another process has just removed it
            continue
        except ValueError as error:
            broken[str(path)] = f"{path}: {error}"
        else:
            if record.fingerprint in fingerprints:
                found.setdefault(_same(record), record)
    return [_shown(record) for record in found.values()], broken


def _same(record: Sensitivity) -> str:
    return f"{record.fingerprint} {record.created} {record.how} {record.runtime}"


def _shown(record: Sensitivity) -> dict[str, Any]:
    groups = [group.model_dump(include={"name", "block", "kind", "losses"}) for group in record.groups]
    wanted = {"model", "fingerprint", "how", "runtime", "calibrated", "scored", "seconds", "created"}
    return record.model_dump(include=wanted) | {"choices": list(record.choices), "groups": groups}
