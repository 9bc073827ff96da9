"""Sweeps of tiny models: every combination, the best go on, and a kill at any moment ends in the same runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from sweep_support import deadly_runner
from typer.testing import CliRunner

from compress.cli import app
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.measure.record import Record
from compress.reports.compare import Line
from compress.scale.units import RayOptions
from compress.search import sweep_worker
from compress.search.sweep import Result, SweepOptions, Swept, _Sweep, describe, sweep
from compress.search.sweep_file import Plan, Point, Range, Space, read_sweep
from compress.search.sweep_table import best_in_words, print_sweep
from compress.search.sweep_worker import Outcome, RunUnit, do_run
from compress.search.trials import Trials

ROOT = Path(__file__).parents[2]
BASE = """
steps:
  - {method: rtn, bits: 4, activations: none}
measure: {what: [], count: 24}
evaluate: {tasks: [MiniSTS]}
"""
BITS = "values:\n  steps.0.bits: [2, 3, 4, 8]\n"


@pytest.fixture
def write(tmp_path: Path, bert: Path) -> Callable[..., Path]:
    """Write a sweep file of a base recipe on the tiny model."""

    def written(text: str, base: str = BASE, models: tuple[Path, ...] = (bert,)) -> Path:
        (tmp_path / "base.yaml").write_text(base)
        path = tmp_path / "sweep.yaml"
        path.write_text(f"recipes: [base.yaml]\nmodels: {json.dumps([str(model) for model in models])}\n{text}")
        return path

    return written


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are done in this process; the labels of those that are."""
    labels: list[str] = []

    def here(unit: RunUnit, say: Callable[[str], None], _: object) -> Outcome:
        labels.append(unit.label)
        return do_run(unit, say)

    monkeypatch.setattr(sweep_worker, "done_in_process", here)
    return labels


def swept(plan: Plan, runs: Path, said: list[str] | None = None, **options: object) -> Swept:
    say = (lambda _: None) if said is None else said.append
    return sweep(plan, SweepOptions(runs, "cpu", **options), say)  # type: ignore[arg-type]


def names(runs: Path) -> list[str]:
    """Whatever is in the folder of runs."""
    return sorted(path.name for path in runs.iterdir())


def test_a_grid_is_the_product_of_recipes_models_and_values(write: Callable[..., Path], tmp_path: Path, bert: Path) -> None:
    (tmp_path / "other.yaml").write_text("take_when: you need it\n" + BASE)
    path = write(
        "values:\n  steps.0.bits: [3, 8]\n  steps.0.group_size: [null, 16, 24]\n  seed: [0, 1]\n", models=(bert, bert.parent)
    )
    path.write_text(path.read_text().replace("[base.yaml]", "[base.yaml, other.yaml]"))
    plan = read_sweep(path)
    points = [point for space in plan.spaces for point in space.grid()]
    found = [(p.recipe.model, p.recipe.steps[0].bits, p.recipe.steps[0].group_size, p.recipe.seed) for p in points]  # type: ignore[attr-defined]
    expected = [
        (str(model), *values)
        for model, _ in product((bert, bert.parent), ("base", "other"))
        for values in product((3, 8), (None, 16, 24), (0, 1))
    ]
    assert found == expected
    assert plan.runs == len(points) == 48
    assert len({(p.recipe.model, p.recipe.name) for p in points}) == 48
    assert points[1].label == "base bits=3 group_size=None seed=1"
    assert points[1].recipe.name == "base-bits-3-group_size-None-seed-1"
    assert points[0].recipe.measure.count == 24
    assert {p.recipe.take_when for p in points} == {""}  # what is said of a recipe is not said of its variations
    assert len([line for line in describe(plan) if line.startswith(("base ", "other "))]) == 48


def test_sweeps_of_the_project_can_be_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "here").mkdir()
    page = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8"), re.S | re.M)
    example = (ROOT / "examples" / "bits.yaml").read_text(encoding="utf-8")
    runs = []
    for text in (example, *page):
        (tmp_path / "here" / "sweep.yaml").write_text(text)
        runs.append(read_sweep(tmp_path / "here" / "sweep.yaml").runs)
    assert runs == [6, 6, 12]
    assert page[0] in example


def test_values_of_a_whole_step_are_numbered(write: Callable[..., Path]) -> None:
    (space,) = read_sweep(write("values:\n  steps.0: [{method: rtn, bits: 3, activations: none}, {method: fp8}]\n")).spaces
    assert [(point.label, point.recipe.steps[0].method) for point in space.grid()] == [("base 0=1", "rtn"), ("base 0=2", "fp8")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rouns: []", "line 3: rouns: unknown key 'rouns'; did you mean 'rounds'?"),
        ("rounds:\n  - taks: [mini]", "line 4: rounds.0.taks: unknown key 'taks'; did you mean 'tasks'?"),
        ("rounds:\n  - keep: 0.5", "line 4: rounds.0.keep: has no effect in the last round"),
        ("values:\n  steps.0.bits: [3, 7]", "line 4: values.steps.0.bits: with 7 in base: steps.0.bits: 7 is not allowed here"),
        ("values:\n  steps.0.bits:\n    - 3\n    - 7", "line 6: values.steps.0.bits: with 7 in base"),
        ("values:\n  steps.0.bitz: [3]", "line 4: values.steps.0.bitz: with 3 in base: steps.0.bitz: unknown key 'bitz'; did you mean 'bits'?"),
        ("values:\n  steps.1.bits: [3]", "steps.1.bits: with 3 in base: steps.1: '1' is no place in the list: the list has 1"),
        ("values:\n  seed.x: [3]", "values.seed.x: with 3 in base: seed: input should be a valid integer"),
        ("values:\n  steps.0.bits: 3", "line 4: values.steps.0.bits: a list of values, or a range such as"),
        ("values:\n  steps.0.bits: []", "line 4: values.steps.0.bits: a list of values, or a range such as"),
        ("values:\n  seed: [1, 2, 1]", "line 4: values.seed.2: 1 is given twice"),
        ("values:\n  seed: {low: 1, hihg: 4}", "values.seed.hihg: unknown key 'hihg'; did you mean 'high'?"),
        ("values:\n  seed: {low: 4, high: 4}", "values.seed: low must be less than high, got 4 and 4"),
        ("values:\n  seed: {low: 0, high: 4, log: true}", "values.seed: log needs a low above 0"),
        ("values:\n  seed: {low: 1, high: 4, step: 2}", "values.seed: high is no whole number of steps of 2 above low"),
        ("values:\n  evaluate.margin: {low: 0.5, high: 2.5}", "values.evaluate.margin: with 2.5 in base: evaluate.margin: input should be less"),
        ("values:\n  steps.0.bits: {low: 2, high: 8}", "line 4: values.steps.0.bits: with 7 in base: steps.0.bits: 7 is not allowed here"),
        ("values:\n  model: [nano]", "values.model: is not varied: `models` lists them"),
        ("values:\n  take_when: [you like]", "values.take_when: is not varied: it decides nothing"),
        ("values:\n  steps: [[]]\n  steps.0.bits: [3]", "line 5: values.steps.0.bits: is inside of steps, which is varied too"),
        ("values:\n  measure.lengths: [[8]]", "line 4: values.measure.lengths: with [8] in base: measure: value error, `lengths` has no effect"),
        ("values:\n  steps.0.activations: [none, dynamic_per_token]\n  steps.0.group_size: [16]",
         "line 3: values: steps.0.activations: 'dynamic_per_token', steps.0.group_size: 16 do not go together in base: steps.0: value error"),
        ("values:\n  evaluate.tasks: [[mini]]\nrounds: [{tasks: [mini]}]", "values.evaluate.tasks: the rounds name the tasks"),
        ("values:\n  seed: [" + ",".join(map(str, range(1001))) + "]", "1,001 runs, at most 1,000 are taken"),
        ("best: speed", "line 3: best: speed is not measured for base: measure.what has no speed"),
        ("best: cosine", "line 3: best: cosine is not measured for base: measure.what has no fidelity"),
        ("rounds: [{tasks: []}]", "best: kept is not measured for base: a round has no tasks"),
        ("a: [", "not YAML"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_place(write: Callable[..., Path], text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_sweep(write(text))
    assert message in f"{caught.value.message}\n{caught.value.hint}"


def test_files_that_are_named_wrongly_are_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "base.yaml").write_text(BASE)
    for text, message in (
        ("recipes: [basе.yaml]", "line 1: recipes.0: recipe .*: cannot be read"),
        ("recipes: [base.yaml, base.yaml]", "line 1: recipes.1: 'base.yaml' is given twice"),
        ("recipes: [base.yaml, sub/base.yaml]", "recipes.1: its name, 'base', is that of an earlier one"),
        ("recipes: [base.yaml]\nmodels: [nano, nano]", "line 2: models.1: 'nano' is given twice"),
        ("recipes: []", "line 1: recipes: "),
        ("recipes: [base.yaml]\nmodels: ['random:bert']", "has random weights"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_sweep(path)


def test_a_run_that_would_be_refused_stops_the_sweep_before_it_begins(
    write: Callable[..., Path], tmp_path: Path, started: list[str]
) -> None:
    plan = read_sweep(write("values:\n  runtime: [torch, numpy]\n"))
    with pytest.raises(UserError, match=r"^base runtime=numpy on .*: numpy executes static tables only"):
        swept(plan, tmp_path / "runs")
    plan = read_sweep(write("rounds: [{tasks: [MiniSTS]}, {tasks: [MiniSTX]}]"))
    with pytest.raises(UserError, match="unknown task 'MiniSTX'"):
        swept(plan, tmp_path / "runs")
    assert started == names(tmp_path / "runs") == []


def test_the_best_of_a_round_go_on(write: Callable[..., Path], tmp_path: Path, started: list[str]) -> None:
    said: list[str] = []
    plan = read_sweep(write(BITS + "rounds:\n  - {tasks: [MiniSTS], keep: 0.5}\n  - {tasks: [MiniPairClassification]}\n"))
    found = swept(plan, tmp_path / "runs", said)
    records = [Record.read(path) for path in (tmp_path / "runs").iterdir()]
    first = {record.recipe["steps"][0]["bits"]: record.retained for record in records if record.tasks[0].task == "MiniSTS"}
    last = {record.recipe["steps"][0]["bits"]: record.retained for record in records if record.tasks[0].task != "MiniSTS"}
    ranked = sorted(first, key=lambda bits: -(first[bits] or 0))
    assert len(set(first.values())) == 4
    assert set(last) == set(ranked[:2])
    order = [int(result.point.label.rpartition("=")[2]) for result in found.results]
    assert order == [*sorted(last, key=lambda bits: -(last[bits] or 0)), *ranked[2:]]
    assert [result.round for result in found.results] == [1, 1, 0, 0]
    out = ", ".join(f"base bits={bits}" for bits in ranked[2:])
    assert any(line.endswith(f"2 of 4 go on to round 2; out: {out}") for line in said)
    kept = [result.round for result in found.results if (tmp_path / "runs" / result.run / "variant").exists()]
    assert kept == [1, 1]
    assert len(started) == 6
    assert found.code == 0
    assert swept(plan, tmp_path / "runs").results == found.results
    assert len(started) == 6


def result_of(plan: Plan, bits: int, bytes: int, kept: float | None, missed: float = 0.0) -> Result:
    (space,) = plan.spaces
    line = Line("r", "base", "", "", "", bytes, 0.1, kept, kept, kept, None, (), None, None, None, None, None, None)
    return Result(space.point({"steps.0.bits": bits}), 0, f"run-{bits}", None if kept is None else line, missed)


@pytest.mark.parametrize(
    ("best", "keep", "going"), [("kept", 0.5, {8, 4}), ("kept", 0.51, {8, 4, 3}), ("size", 0.25, {4}), ("size", 0.75, {4, 8, 2})]
)
def test_runs_that_miss_gates_and_failed_ones_come_last(
    write: Callable[..., Path], tmp_path: Path, best: str, keep: float, going: set[int]
) -> None:
    text = f"{BITS}best: {best}\nrounds:\n  - {{tasks: [mini], keep: {keep}}}\n  - {{tasks: [mini]}}\n"
    plan = read_sweep(write(text))
    results = [result_of(plan, 2, 2, 0.5, missed=0.2), result_of(plan, 3, 3, 0.99, missed=0.1)]
    results += [result_of(plan, 4, 4, 0.9), result_of(plan, 8, 8, 0.95), result_of(plan, 6, 6, None)]
    survivors = _Sweep(plan, SweepOptions(tmp_path), lambda _: None)._survivors(results, 0)
    assert {int(one.run.removeprefix("run-")) for one in survivors} == going
    assert [one for one in results if one in survivors] == survivors


def test_the_table_names_the_best_and_those_too_near(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan = read_sweep(write(BITS))
    results = [result_of(plan, 8, 8_000_000, 0.95), result_of(plan, 4, 4_000_000, 0.95), result_of(plan, 3, 3_000_000, 0.9)]
    failed = Result(results[0].point, 0, outcome=Outcome(code=2, error="no\nmend it"))
    found = Swept(tuple(results), (failed,), "kept")
    print_sweep(found)
    printed = capsys.readouterr().out
    assert "8.00" in printed
    assert "95.00 to 95.00" in printed
    assert f"failed in round 1: base bits=8 on {found.models[0]}: no; mend it" in printed
    assert best_in_words(results, "kept") == [
        "best by kept: base bits=8 (run-8)",
        "intervals overlap with that of base bits=4: these scores do not tell them apart",
    ]
    assert found.code == 2


def killed_at(monkeypatch: pytest.MonkeyPatch, moments: tuple[int, ...]) -> None:
    """Let what a run has finished be lost at some moments, with the whole sweep."""
    put, done = Journal.put, [0]

    def killed(self: Journal, key: str, value: dict[str, object]) -> None:
        done[0] += 1
        if done[0] in moments:
            raise KeyboardInterrupt
        put(self, key, value)

    monkeypatch.setattr(Journal, "put", killed)


def written_at(runs: Path) -> dict[str, int]:
    """When the records of complete runs were written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in runs.glob("*/record.json") if path.parent.name[0] != "."}


@pytest.mark.parametrize("values", ["steps.0.bits: [3, 4, 8]", "seed: {low: 0, high: 99}"])
def test_a_killed_sweep_ends_in_the_same_runs(
    write: Callable[..., Path], tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    if "low" in values:
        pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    plan = read_sweep(write(f"values:\n  {values}\ntrials: 4\nbatch: 2\nbest: size\n", BASE.replace("[MiniSTS]", "[]")))
    whole = swept(plan, tmp_path / "whole")
    killed_at(monkeypatch, (1, 5, 9))
    kills: list[dict[str, int]] = []
    while True:
        try:
            again = swept(plan, tmp_path / "killed")
            break
        except KeyboardInterrupt:
            kills.append(written_at(tmp_path / "killed"))
    assert len(kills) >= 2  # one may hit a run that nobody waits for any more
    assert any(kills)
    assert all(kept.items() <= written_at(tmp_path / "killed").items() for kept in kills)
    assert names(tmp_path / "killed") == names(tmp_path / "whole")
    assert [(one.point, one.run) for one in again.results] == [(one.point, one.run) for one in whole.results]


def test_trials_are_those_of_the_seed_and_of_what_was_found() -> None:
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    lists = {"how": ("a", None, (1, 2))}
    ranges = {
        "bits": Range(low=2, high=8),
        "alpha": Range(low=0.0, high=1.0, step=0.25),
        "rate": Range(low=1e-4, high=1.0, log=True),
    }

    def drawn(seed: int, better: int) -> list[dict[str, Any]]:
        trials, found = Trials(lists, ranges, seed), []
        for _ in range(12):
            for trial, values in trials.draw(3):
                found.append(values)
                # Few bits are best, and too few miss a gate.
                trials.tell(trial, better * float(values["bits"]), max(0.0, 4.0 - values["bits"]))
        return found

    first = drawn(0, -1)
    assert first == drawn(0, -1)
    assert first != drawn(1, -1)
    assert first != drawn(0, 1)
    assert {values["how"] for values in first} == set(lists["how"])
    assert all(values["bits"] in range(2, 9) and values["alpha"] in (0, 0.25, 0.5, 0.75, 1) for values in first)
    assert all(1e-4 <= values["rate"] <= 1 for values in first)
    later = [values["bits"] for values in first[12:]]
    assert sum(4 <= bits <= 6 for bits in later) > len(later) / 2  # the least that misses nothing, and a few more


def test_values_that_are_drawn_and_make_no_recipe_are_failed_runs(
    write: Callable[..., Path], tmp_path: Path, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="the extra `sweep` is not installed")
    plan = read_sweep(write("values:\n  seed: {low: 0, high: 3}\ntrials: 8\nbest: size\n", BASE.replace("[MiniSTS]", "[]")))
    right = Space.point

    def odd_refused(space: Space, values: Any) -> Point:
        if values["seed"] % 2:
            raise UserError("seed: is odd")
        return right(space, values)

    monkeypatch.setattr(Space, "point", odd_refused)
    found = swept(plan, tmp_path / "runs")
    labels = {one.point.label for one in (*found.results, *found.failed)}
    assert labels <= {f"base seed={seed}" for seed in range(4)}
    assert started == list(dict.fromkeys(started))  # the same values are one run
    assert sorted(started) == sorted(one.point.label for one in found.results)
    assert {one.outcome.error for one in found.failed} == {"seed: is odd"}
    assert found.code == 2


def test_a_range_without_optuna_names_the_extra(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    plan = read_sweep(write("values:\n  seed: {low: 0, high: 9}\n"))
    with pytest.raises(UserError, match="Optuna is not installed") as caught:
        swept(plan, tmp_path / "runs")
    assert "compress-embedders[sweep]" in caught.value.hint


def broken(model: Path, folder: Path) -> Path:
    """A copy of a model that has a weight that is not a number."""
    shutil.copytree(model, folder)
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, path, metadata={"format": "pt"})
    return folder


def processes_of_their_own(*arguments: str) -> tuple[int, str]:
    """The command as a user calls it; return its exit code and what it printed."""
    done = subprocess.run([sys.executable, "-m", "compress.cli", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_that_fails_is_reported_and_the_others_go_on(
    request: pytest.FixtureRequest, write: Callable[..., Path], tmp_path: Path, bert: Path, own: bool
) -> None:
    """The command: runs in processes of their own, two at a time, as a user has them; or in this one, after one another."""
    if not own:
        request.getfixturevalue("started")
    path = write("best: size\n", BASE.replace("[MiniSTS]", "[]"), models=(broken(bert, tmp_path / "broken"), bert))
    command = ["sweep", str(path), "--runs", str(tmp_path / "runs"), "--workers", "2" if own else "1", "--device", "cpu"]
    if own:
        code, printed = processes_of_their_own(*command)
    else:
        done = CliRunner().invoke(app, command)
        code, printed = done.exit_code, done.stdout
    assert code == 2, printed
    assert f"failed in round 1: base on {tmp_path / 'broken'}: " in printed.replace("\n", "")
    assert "best by size: base (base-bert" in printed
    (run,) = [name for name in names(tmp_path / "runs") if not name.startswith(".")]
    assert Record.read(tmp_path / "runs" / run).model.name == bert.name


def test_the_process_of_a_run_that_is_killed_is_a_failed_run(tmp_path: Path) -> None:
    unit = RunUnit("x", {}, str(tmp_path), "cpu", str(tmp_path))
    outcome = sweep_worker.done_in_process(unit, print, lambda process: process.kill())
    assert (outcome.run, outcome.code) == ("", 2)
    assert outcome.error.startswith("its process was killed by signal 9")
    gone = sweep_worker.done_in_process(replace(unit, folder=str(tmp_path / "none")), print, lambda process: process.kill())
    assert (gone.code, gone.error.splitlines()[1]) == (2, "the folder has to be there on every machine")


@pytest.mark.slow
def test_workers_of_ray_make_the_same_runs_whoever_is_killed(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    monkeypatch.setenv("PYTHONPATH", ":".join(path for path in sys.path if path))  # of the workers
    base = BASE.replace("[MiniSTS]", "[]").replace("what: []", "what: [fidelity]")
    plan = read_sweep(write("values:\n  steps.0.bits: [3, 4]\nbest: cosine\n", base))
    monkeypatch.setattr(sweep_worker, "make_runner", deadly_runner)
    said: list[str] = []
    there = swept(plan, tmp_path / "there", said, ray=RayOptions(workers=2))
    assert (tmp_path / "there" / "died").exists()
    assert any(": continuing base-bits-" in line for line in said)  # what the dead worker's run had finished was not done again
    monkeypatch.setattr(sweep_worker, "done_in_process", lambda unit, say, _: do_run(unit, say))
    here = swept(plan, tmp_path / "here")
    assert [(one.run, one.line) for one in there.results] == [(one.run, one.line) for one in here.results]
    assert names(tmp_path / "there") == sorted([*names(tmp_path / "here"), "died"])
