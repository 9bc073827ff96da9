"""The script for GPUs runs on a CPU with tiny shapes, so that it is whole when a card is there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
QUICK = ("products", "equal_lengths", "correctness", "real_lengths", "one_query", "published", "padding", "text_to_vector")
# What a card's bare machine does not have; a name that is None cannot be imported.
MISSING = (
    "mteb", "datasets", "scipy", "sklearn", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino", "typer", "rich", "plotly",
    "bitsandbytes", "torchao", "sentence_transformers", "optimum", "gptqmodel",
)  # fmt: skip
BARE = f"import sys, runpy; sys.modules.update(dict.fromkeys({MISSING})); "


def rows(to: Path, *arguments: str) -> dict[str, list[dict[str, Any]]]:
    code = f"{BARE}sys.argv = {[str(GPU / 'rows.py'), '--to', str(to), '--device', 'cpu', '--small', *arguments]!r}; "
    code += f"runpy.run_path({str(GPU / 'rows.py')!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    found: dict[str, list[dict[str, Any]]] = {}
    for line in to.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["row"], []).append(row)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    return found


def check(found: dict[str, list[dict[str, Any]]]) -> None:
    for name, lines in found.items():
        for line in lines:
            assert "failed" not in line, line
            assert line.get("right", True), f"{name}: {line}"


def test_the_rows_run(tmp_path: Path) -> None:
    found = rows(tmp_path / "rows.jsonl", "--only", ",".join(QUICK))
    check(found)
    assert list(found) == ["machine", *QUICK]
    assert found["published"][0]["lowest_cosine"] > 0.9999
    assert found["equal_lengths"][0]["tokens"] == 256
    assert set(found["equal_lengths"][0]["times_bf16"]) == {"fp8", "int8"}


def test_a_row_that_fails_is_a_line_and_the_time_is_kept(tmp_path: Path) -> None:
    found = rows(tmp_path / "rows.jsonl", "--only", "products,padding", "--seconds", "-1")
    assert [line["skipped"] for line in (*found["products"], *found["padding"])] == ["the -1 s were over"] * 2


def test_a_row_is_stopped_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(GPU), *sys.path])
    import rows as script

    with pytest.raises(script.Stopped, match="time was over"), script.at_most(0.05):
        time.sleep(5)
    time.sleep(0.06)  # nothing stops what comes after


@pytest.mark.slow
def test_the_other_rows_run(tmp_path: Path) -> None:
    check(rows(tmp_path / "rows.jsonl", "--only", "small_encoder,compressing,training,sparse_products,bitsandbytes"))
