"""Which sensitivities the page shows: files with the runs, and the cache's of the runs' models."""

from __future__ import annotations

import shutil
from pathlib import Path

from dashboard_support import RESULTS, RUN, sensitivity

from compress.common.cache import use
from compress.common.journal import Journal
from compress.measure.record import Record
from compress.reports.dashboard.payload import payload


def test_files_and_the_cache_are_read_once_and_only_for_the_runs_models(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(RESULTS / RUN, folder / RUN)
    own = Record.read(RESULTS / RUN).model.fingerprint
    sensitivity(own).write(folder / "one.sensitivity.json")
    sensitivity("of-another-model").write(folder / RUN / "two.sensitivity.json")
    (folder / "bad.sensitivity.json").write_text("{}")
    for name, record in (("a", sensitivity(own)), ("b", sensitivity(own, "2026-11-29")), ("c", sensitivity("a-stranger"))):
        Journal(use("sensitivity", name), checked=True).put("record", record.model_dump(mode="json"))
    damaged = Journal(use("sensitivity", "d"), checked=True).path("record")
    damaged.write_text('{"sha256": "0", "value": {}}')
    told = payload([folder])
    assert sorted((one["fingerprint"], one["created"]) for one in told["sensitivities"]) == sorted(
        [(own, "2026-11-28"), (own, "2026-11-29"), ("of-another-model", "2026-11-28")]
    )
    assert {Path(place).name for place in told["broken"]} == {"bad.sensitivity.json", "record.json"}
    assert "checksum" in told["broken"][str(damaged)]
    assert told["sensitivities"][0]["groups"][0] == {
        "name": "0.qkv",
        "block": 0,
        "kind": "qkv",
        "losses": {"int8": 1e-6, "int4": 1e-3},
    }
