"""The command line as a user meets it: exit codes, clean lines, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from tests_support import call_here

import compress
from compress import cli

RECIPE = """
description: for tests
steps:
  - method: rtn
measure: {what: [], count: 24, rounds: 1, requests: 10, threads: 1}
evaluate: {tasks: [MiniSTS]}
"""


def call(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "quick.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("what", ["fidelity", pytest.param("fidelity, speed", marks=pytest.mark.slow)])
def test_run_prints_and_records(
    recipe: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], what: str
) -> None:
    recipe.write_text(RECIPE.replace("what: []", f"what: [{what}]"))
    monkeypatch.chdir(tmp_path)
    code, printed, said = call_here(capfd, "run", recipe, "--model", bert, "--runs", tmp_path / "out")
    assert code == 0, said
    measured = ["vs float32"] if "speed" in what else []
    for wanted in ("MiniSTS", "cosine_spearman", "int8 x dynamic_per_token", "verdict:", "record: ", *measured):
        assert wanted in printed
    run_folder = next((tmp_path / "out").iterdir())
    (tmp_path / "texts.txt").write_text("one\ntwo words\n")
    code, _, said = call_here(capfd, "encode", run_folder, tmp_path / "texts.txt", "-o", tmp_path / "v.npy")
    assert code == 0, said
    expected = compress.load(str(run_folder)).encode(["one", "two words"])
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), expected, atol=1e-6)


def test_a_missed_gate_is_exit_code_1(
    recipe: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE + "gates: {size_ratio: 0.01}\n")
    monkeypatch.chdir(tmp_path)
    code, printed, said = call_here(capfd, "run", recipe, "--model", bert)
    assert code == 1
    assert "MISSED" in printed
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("stepps: []", [], "quick.yaml, line 1: stepps: unknown key"),
        ("seed: x", [], "quick.yaml, line 1: seed:"),
        ("steps:\n- method: rtm", [], "unknown method 'rtm'"),
        ("a: [", [], "not YAML"),
        (RECIPE, ["--model", "no/such/folder"], "not a folder"),
        (RECIPE, ["--model", "PICKLE"], "only pickled weights"),
        (RECIPE, ["--tasks", "STSBenchmrk"], "unknown task 'STSBenchmrk'"),
        (RECIPE, ["--data", "BROKEN", "--tasks", "STSBenchmark"], "test.jsonl, line 2: not JSON"),
        (RECIPE, ["--runs", "quick.yaml/results"], "cannot be written"),
        (RECIPE, ["--device", "cuda"], "sees no GPU"),
    ],
)
def test_bad_input_is_a_clean_error(
    recipe: Path,
    bert: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    text: str,
    arguments: list[str],
    message: str,
) -> None:
    recipe.write_text(text)
    (tmp_path / "PICKLE").mkdir()
    (tmp_path / "PICKLE" / "config.json").write_text((bert / "config.json").read_text())
    (tmp_path / "PICKLE" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "BROKEN" / "STSBenchmark").mkdir(parents=True)
    good = '{"sentence1": "a", "sentence2": "b", "score": 1}\n'
    (tmp_path / "BROKEN" / "STSBenchmark" / "test.jsonl").write_text(good + "{broken\n")
    before = sorted(tmp_path.rglob("*"))
    model = [] if "--model" in arguments else ["--model", bert]
    monkeypatch.chdir(tmp_path)
    code, _, said = call_here(capfd, "run", "quick.yaml", *model, *arguments)
    assert code == 2
    assert any(line.startswith("error: ") for line in said.splitlines()[-2:])
    assert message in said
    assert "Traceback" not in said
    assert [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.name != "results"] == []


def test_ctrl_c_keeps_what_is_done_and_a_second_run_continues(
    recipe: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "compress.cli", "run", str(recipe), "--model", str(bert)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("baseline 1/1 MiniSTS"):
            break
    else:
        pytest.fail("the run ended before it was stopped")
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: stopped" in printed
    assert "Traceback" not in printed
    (partial,) = (tmp_path / "results").iterdir()
    assert partial.name.endswith(".partial")
    time.sleep(0.1)
    monkeypatch.chdir(tmp_path)
    code, _, said = call_here(capfd, "run", recipe, "--model", bert)
    assert code == 0, said
    assert "continuing " in said
    assert "rtn: " not in said
    assert not partial.exists()


def test_plan_describes_a_model_without_its_files(tmp_path: Path, recipe: Path) -> None:
    result = call("plan", recipe, "--model", "nvidia/NV-Embed-v2", cwd=tmp_path)
    assert result.returncode == 0
    assert "7,851.0 M parameters" in result.stdout
    assert "latent-attention head folded, 505.4 M fewer parameters" in result.stdout
    assert "224 linear layers, 6,979.3 M weights to int8" in result.stdout
    assert "15.70 GB in half precision -> 7.72 GB" in result.stdout
    assert not (tmp_path / "results").exists()


COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def parsed(verb: str, *words: str) -> dict[str, object]:
    """What a command would be called with."""
    parameters: dict[str, object] = COMMANDS[verb].make_context(verb, list(words)).params
    return parameters


@pytest.mark.parametrize(
    ("verb", "words", "old", "new"),
    [
        ("run", ["recipe.yaml"], "--output", "--runs"),
        ("plan", ["recipe.yaml"], "--output", "--runs"),
        ("encode", ["nano", "texts.txt"], "--output", "--to"),
        ("evaluate", ["nano"], "--output", "--to"),
        ("evaluate", ["nano"], "--outputs", "--vector-formats"),
        ("export", ["run", "--format", "onnx"], "--output", "--to"),
        ("compare", ["results"], "--output", "--to"),
        ("dashboard", ["results"], "--output", "--to"),
    ],
)
def test_an_old_spelling_means_the_new_one_and_says_so(
    capsys: pytest.CaptureFixture[str], verb: str, words: list[str], old: str, new: str
) -> None:
    wanted = parsed(verb, *words, new, "place")
    assert capsys.readouterr().err == ""
    assert "place" in map(str, wanted.values())
    for given in ([old, "place"], [f"{old}=place"]):
        assert parsed(verb, *words, *given) == wanted
        assert capsys.readouterr().err == f"{old} is now {new}; the old spelling will be removed in the next release\n"
    shown = COMMANDS[verb].get_help(COMMANDS[verb].make_context(verb, words, resilient_parsing=True))
    assert new in shown
    assert old not in shown.split()


def test_what_follows_two_dashes_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed("compare", "--", "--output")["runs"] == [Path("--output")]
    assert capsys.readouterr().err == ""


def test_an_old_spelling_runs(tmp_path: Path) -> None:
    results = Path(__file__).parents[1] / "results"
    result = call("compare", results, "--format", "json", "--output", tmp_path / "all.json", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "")
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "all.json").exists()
