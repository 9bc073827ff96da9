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
QUICK = ("products", "equal_lengths", "published")
OTHERS = ("correctness", "real_lengths", "one_query", "padding", "text_to_vector")
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


def test_a_row_that_fails_is_a_line_and_the_time_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(GPU), *sys.path])
    import rows as script

    def failing(_: object) -> Any:
        raise ValueError("no such card")

    def measured(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        file = tmp_path / "rows.jsonl"
        monkeypatch.setattr(sys, "argv", ["rows.py", "--to", str(file), "--device", "cpu", "--small", *arguments])
        code = script.main()
        return code, [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()][1:]  # behind the machine's

    code, found = measured("--only", "products,padding", "--seconds", "-1")
    assert code == 0
    assert [(line["row"], line["skipped"]) for line in found] == [(name, "the -1 s were over") for name in ("products", "padding")]
    monkeypatch.setitem(script.ROWS, "products", failing)
    monkeypatch.setitem(script.ROWS, "padding", lambda _: [{"right": True}])
    code, found = measured("--only", "products,padding")
    assert code == 1
    assert [line["row"] for line in found] == ["products", "padding"]
    assert found[0]["failed"] == "ValueError: no such card"
    assert found[1]["right"]


def test_a_row_is_stopped_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(GPU), *sys.path])
    import rows as script

    with pytest.raises(script.Stopped, match="time was over"), script.at_most(0.05):
        time.sleep(5)
    time.sleep(0.06)  # nothing stops what comes after


@pytest.mark.slow
def test_the_other_rows_run(tmp_path: Path) -> None:
    names = (*OTHERS, "small_encoder", "compressing", "training", "sparse_products", "bitsandbytes")
    found = rows(tmp_path / "rows.jsonl", "--only", ",".join(names))
    check(found)
    assert {"machine", *OTHERS} <= set(found)
