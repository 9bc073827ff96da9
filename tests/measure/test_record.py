"""Records: typed in Python, unchanged on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.common.errors import UserError
from compress.measure.record import RECORD_FILE, Record
from compress.measure.speed.timing import Speed
from compress.measure.vectors.fidelity import Fidelity

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(path.parent for path in RESULTS.glob(f"*/{RECORD_FILE}"))


def test_every_record_is_written_as_it_was_read(tmp_path: Path) -> None:
    assert len(RUNS) > 80
    typed = 0
    for run in RUNS:
        record = Record.read(run)
        typed += isinstance(record.fidelity, Fidelity) and all(isinstance(row.speed, Speed) for row in record.rows)
        record.write(tmp_path)
        assert (tmp_path / RECORD_FILE).read_text(encoding="utf-8") == (run / RECORD_FILE).read_text(encoding="utf-8"), run.name
    assert typed > 50


def test_a_new_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    read = Record.read(RUNS[0])
    new = Record(**{name: getattr(read, name) for name in Record.model_fields if name != "schema_version"})
    new.write(tmp_path)
    assert Record.read(tmp_path) == new
    assert json.loads((tmp_path / RECORD_FILE).read_text(encoding="utf-8"))["schema_version"] == 1


def test_a_wrong_value_is_refused_by_name(tmp_path: Path) -> None:
    record = json.loads((RUNS[0] / RECORD_FILE).read_text(encoding="utf-8"))
    record["rows"][0]["speed"] = {"texts_per_second": "fast"}
    (tmp_path / RECORD_FILE).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"record\.json: rows\.0\.speed\.texts_per_second"):
        Record.read(tmp_path)
