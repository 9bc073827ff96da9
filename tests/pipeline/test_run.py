"""A recipe from end to end on a tiny model: what is recorded, what is kept when it is stopped, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.common.locks import locked
from compress.layers.float_layers import has_onednn_linear
from compress.measure import scored as scoring
from compress.measure.accuracy import score as accuracy
from compress.measure.record import Record
from compress.pipeline import measuring
from compress.pipeline import run as pipeline
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import parse_recipe, read_recipe
from compress.pipeline.run import kept_record, run
from compress.runtimes import loading

SMALL: dict[str, Any] = {
    "name": "small",
    "steps": [{"method": "rtn"}],
    "measure": {"what": ["fidelity"], "count": 24},
    "evaluate": {"tasks": ["MiniSTS", "MiniRetrieval"]},
}
# Speed takes processes of its own and seconds for each, so only the test that is about it measures it.
FAST: dict[str, Any] = {"count": 24, "rounds": 2, "requests": 10, "threads": 1}


@pytest.fixture
def small() -> Recipe:
    return parse_recipe(SMALL)


@pytest.fixture(scope="module")
def finished(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """A run that nobody disturbed, and its folder."""
    output = tmp_path_factory.mktemp("results")
    record = run(parse_recipe(SMALL), model=str(bert), output=output, device="cpu")
    return record, output / record.run


def what_was_found(record: Record) -> dict[str, Any]:
    """The part of a record that repeating the run gives again: everything but times and memory."""
    tasks = [(task.task, task.baseline, task.variant, task.data, task.prompts, task.interval, task.index) for task in record.tasks]
    sizes = [(row.name, row.size_bytes, row.weights, row.activations) for row in record.rows]
    return {"run": record.run, "tasks": tasks, "fidelity": record.fidelity, "sizes": sizes, "model": record.model}


def test_the_run_s_folder_is_its_content(finished: tuple[Record, Path]) -> None:
    record, folder = finished
    assert sorted(path.name for path in folder.iterdir()) == ["mteb", "recipe.yaml", "record.json", "variant"]
    assert [path.name for path in folder.parent.iterdir()] == [record.run]
    assert Record.read(folder) == record
    resolved = read_recipe(folder / "recipe.yaml")
    assert resolved.model_dump() == parse_recipe(record.recipe).model_dump()


def test_the_record_says_what_the_variant_is(finished: tuple[Record, Path], bert: Path) -> None:
    record, folder = finished
    variant = record.row("variant")
    assert (variant.weights, variant.activations, variant.runtime, variant.device) == ("int8", "dynamic_per_token", "torch", "cpu")
    assert variant.size_bytes == (folder / "variant" / "model.safetensors").stat().st_size
    assert record.baseline.startswith("float32: stands in for float16: lowest cosine")
    assert (record.model.dimension, record.model.max_length, record.model.weights) == (48, 48, "pretrained")
    assert record.retained == pytest.approx(
        np.mean([task.variant for task in record.tasks]) / np.mean([task.baseline for task in record.tasks])
    )


def test_fidelity_and_scores_are_those_of_the_saved_variant(finished: tuple[Record, Path], bert: Path) -> None:
    """Measured independently of the pipeline: the record's figures belong to the file in the run's folder."""
    from compress.data.texts import mixed_texts
    from compress.measure.accuracy.tasks import find_tasks
    from compress.measure.vectors.fidelity import fidelity

    record, folder = finished
    texts = mixed_texts(24, 0)
    opened, baseline = compress.load(str(folder), device="cpu"), compress.load(str(bert), device="cpu")
    assert record.fidelity == fidelity(baseline.encode(texts), opened.encode(texts), texts)
    task = find_tasks(["MiniSTS"], None)[0]
    assert record.tasks[0].task == "MiniSTS"
    assert record.tasks[0].variant == accuracy.score_task(opened, task).score
    assert record.tasks[0].baseline == accuracy.score_task(baseline, task).score
    assert {info.dtype for info in folder_of(folder / "variant").headers.values()} == {"I8", "F16", "F32"}


def test_a_finished_run_is_returned_and_fresh_runs_it_again(finished: tuple[Record, Path], bert: Path, small: Recipe) -> None:
    record, folder = finished
    said: list[str] = []
    assert run(small, model=str(bert), output=folder.parent, device="cpu", say=said.append) == record
    assert "is there already" in said[0]


def test_a_record_whose_variant_is_gone_is_no_finished_run(
    finished: tuple[Record, Path], bert: Path, small: Recipe, tmp_path: Path
) -> None:
    """Records are kept in the repository without their variants, and must not answer in place of a run."""
    kept = Path(shutil.copytree(finished[1], tmp_path / finished[0].run))
    shutil.rmtree(kept / "variant")
    said: list[str] = []
    on_bert = small.model_copy(update={"model": str(bert)})
    assert kept_record(on_bert, tmp_path, "cpu") is None
    record = run(small, model=str(bert), output=tmp_path, device="cpu", say=said.append)
    assert kept_record(on_bert, tmp_path, "cpu") == record
    assert "running it again" in said[0]
    assert record.created >= finished[0].created
    assert (kept / "variant" / "model.safetensors").exists()


@pytest.mark.parametrize("stop_at", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stopped_run_continues_where_it_was(
    finished: tuple[Record, Path], bert: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    calls: list[str] = []
    right = accuracy.score_task

    def counted(embedder: Any, task: Any, *arguments: Any) -> Any:
        calls.append(task.name)
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        return right(embedder, task, *arguments)

    monkeypatch.setattr(accuracy, "score_task", counted)
    with pytest.raises(KeyboardInterrupt):
        run(small, model=str(bert), output=tmp_path, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == [f".{finished[0].run}.partial"]
    monkeypatch.setattr(pipeline._Run, "_make_variant", lambda self: pytest.fail("the variant was made again"))
    said: list[str] = []
    record = run(small, model=str(bert), output=tmp_path, device="cpu", say=said.append)
    assert said[0] == f"continuing {record.run}"
    assert len(calls) == 2 * 2 + 2 + 1  # two models on two tasks, each other's index, and the call that was stopped
    assert what_was_found(record) == what_was_found(finished[0])
    assert [path.name for path in tmp_path.iterdir()] == [record.run]


def test_another_recipe_model_or_package_set_is_another_run(
    finished: tuple[Record, Path], bert: Path, make_model: Any, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(recipe: Recipe, model: Path) -> str:
        recipe = recipe.model_copy(update={"model": str(model)})
        return pipeline._Run(recipe, tmp_path, "cpu", print).name.rsplit("-", 1)[1]

    same = name(small, bert)
    assert finished[0].run.endswith(same)
    changed = parse_recipe({**SMALL, "steps": [{"method": "rtn", "activations": "none"}]})
    names = {same, name(changed, bert), name(small, make_model("mistral"))}
    monkeypatch.setattr(scoring, "versions", lambda: {"torch": "0"})
    names.add(name(small, bert))
    assert len(names) == 4
    described = small.model_copy(update={"description": "other words", "take_when": "you like", "not_when": "you do not"})
    monkeypatch.undo()
    assert name(described, bert) == same


@pytest.mark.parametrize(
    ("missed", "measure"),
    [({"size_ratio": 0.01}, SMALL["measure"]), pytest.param({"speedup": 1000.0, "size_ratio": 0.99}, FAST, marks=pytest.mark.slow)],
    ids=["size", "speed"],
)
def test_gates_decide_and_no_export_leaves_the_record_alone(
    bert: Path, tmp_path: Path, missed: dict[str, float], measure: dict[str, Any]
) -> None:
    recipe = parse_recipe(
        {**SMALL, "gates": {**missed, "cosine_mean": 0.5, "overlap_at_10": 0.1}, "export": []}
        | {"evaluate": {"tasks": ["MiniSTS"]}, "measure": measure}
    )
    record = run(recipe, model=str(bert), output=tmp_path, device="cpu")
    first = next(iter(missed))
    assert {gate.name: gate.kept for gate in record.gates} == {
        **{name: name != first for name in missed},
        "cosine_mean": True,
        "overlap_at_10": True,
    }
    assert f"misses {first}" in record.verdict
    if "speedup" in missed:
        half = {"bfloat16"} if has_onednn_linear(torch.bfloat16) else set()
        assert {row.name for row in record.rows} == {"float32", "variant"} | half
        assert record.row("float32").size_bytes == 4 * record.model.parameters
    assert sorted(path.name for path in (tmp_path / record.run).iterdir()) == ["mteb", "recipe.yaml", "record.json"]


def test_float16_is_the_baseline_where_float32_differs(
    bert: Path, small: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "STAND_IN_COSINE", 1.1)
    recipe = small.model_copy(update={"evaluate": small.evaluate.model_copy(update={"tasks": ("MiniSTS",)})})
    record = run(recipe, model=str(bert), output=tmp_path, device="cpu")
    assert record.baseline.startswith("float16: used, because float32 differs")


def test_faults_are_found_before_anything_is_written(bert: Path, small: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "results"
    for arguments, message in (
        ({"tasks": ["nonesuch"]}, "unknown task"),
        ({"model": "nonesuch"}, "not a folder"),
        ({"texts": str(tmp_path / "none.txt")}, "cannot be read"),
        ({"data": tmp_path / "none"}, "not a folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(small, **{"model": str(bert), "output": output, "device": "cpu", **arguments})
        assert not output.exists() or list(output.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        run(small, model=str(bert), output=tmp_path / "file" / "results", device="cpu")


def test_a_variant_is_not_compressed_again(finished: tuple[Record, Path], small: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a variant that was compressed already"):
        run(small, model=str(finished[1]), output=tmp_path, device="cpu")


def test_a_pattern_that_matches_no_layer_is_refused_before_loading(bert: Path, tmp_path: Path) -> None:
    recipe = parse_recipe({**SMALL, "steps": [{"method": "rtn", "skip": ["*.q_proj"]}]})
    with pytest.raises(UserError, match=r"steps\.0: pattern '\*\.q_proj' matches none of the model's 12 linear layers"):
        run(recipe, model=str(bert), output=tmp_path, device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_prompts_of_the_recipe_go_before_the_model_s_own(bert: Path, tmp_path: Path) -> None:
    recipe = {**SMALL, "steps": [], "measure": {"what": []}}
    prompts = {"MiniSTS": "same meaning: ", "MiniRetrieval-query": "find: "}
    evaluate = {"tasks": ["MiniSTS", "MiniRetrieval"]}
    plain = run(parse_recipe({**recipe, "evaluate": evaluate}), model=str(bert), output=tmp_path, device="cpu")
    said = run(
        parse_recipe({**recipe, "evaluate": {**evaluate, "prompts": prompts}}), model=str(bert), output=tmp_path, device="cpu"
    )
    assert [task.prompts for task in plain.tasks] == [{"text": ""}, {"query": "", "document": ""}]
    assert [task.prompts for task in said.tasks] == [{"text": "same meaning: "}, {"query": "find: ", "document": ""}]
    assert said.tasks[0].baseline != plain.tasks[0].baseline
    assert said.run != plain.run
    wrong = parse_recipe({**recipe, "evaluate": {**evaluate, "prompts": {"MiniRetrieval-querry": "find: "}}})
    with pytest.raises(UserError, match="no task of this run looks for 'MiniRetrieval-querry'") as caught:
        run(wrong, model=str(bert), output=tmp_path, device="cpu")
    assert "MiniRetrieval-query" in caught.value.hint


def test_compress_only_measures_nothing(bert: Path, small: Recipe, tmp_path: Path) -> None:
    record = run(small, model=str(bert), output=tmp_path, device="cpu", compress_only=True)
    assert (record.tasks, record.retained, record.fidelity) == ((), None, None)
    assert [(row.name, row.speed) for row in record.rows] == [("variant", None)]
    assert record.verdict == "accuracy not measured; the recipe sets no gates"
    assert compress.load(str(tmp_path / record.run), device="cpu").encode(["text"]).shape == (1, 48)


def test_what_does_not_fit_in_memory_is_streamed_or_left_out(
    bert: Path, small: Recipe, finished: tuple[Record, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * finished[0].model.parameters
    with monkeypatch.context() as patch:
        patch.setattr(loading, "available_memory_bytes", lambda: 100_000)
        with pytest.raises(UserError, match=r"takes 0\.3 MB of memory in float32, 0\.1 MB are free") as caught:
            compress.load(str(bert), device="cpu")
    assert "--stream" in caught.value.hint
    plan = make_plan(small, folder_of(bert).shape, tmp_path)
    besides = plan.run_memory_bytes - plan.variant_bytes
    monkeypatch.setattr(measuring, "available_memory_bytes", lambda: besides + weights - 1)
    said: list[str] = []
    recipe = parse_recipe({**SMALL, "measure": FAST, "evaluate": {"tasks": ["MiniSTS"], "baseline": "float32"}})
    record = run(recipe, model=str(bert), output=tmp_path, device="cpu", say=said.append)
    assert any(line.startswith("baseline: 0.3 MB do not fit in memory; read block by block") for line in said)
    assert any("the float32 baseline does not fit" in line for line in said)
    assert "float32" not in {row.name for row in record.rows}
    kept = {task.task: task for task in finished[0].tasks}["MiniSTS"]
    assert record.tasks[0].baseline == kept.baseline  # streamed, the same to the last digit


def quick(**changes: Any) -> Recipe:
    return parse_recipe({**SMALL, "measure": {"what": []}, "evaluate": {"tasks": []}} | changes)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "", ".hidden", "a\nb", "n" * 300])
def test_a_name_is_no_path(bert: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").write_text("")
    with pytest.raises(UserError, match="name: "):
        run(quick().model_copy(update={"name": name}), model=str(bert), output=tmp_path / "a" / "b", device="cpu", fresh=True)
    with pytest.raises(UserError, match="name: "):
        quick(name=name)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["x", "x/mine"]


def test_too_few_texts_for_fidelity_are_refused_before_anything_is_computed(bert: Path, tmp_path: Path) -> None:
    recipe = quick(measure={"what": ["fidelity"], "count": 8})
    with pytest.raises(UserError, match=r"measure\.count: 8 texts are too few") as caught:
        run(recipe, model=str(bert), output=tmp_path, device="cpu", say=lambda line: pytest.fail(line))
    assert "at least 11" in caught.value.hint


def test_a_user_s_files_in_a_run_s_folder_outlast_it(bert: Path, tmp_path: Path) -> None:
    record = run(quick(), model=str(bert), output=tmp_path, device="cpu")
    folder = tmp_path / record.run
    (folder / "notes.txt").write_text("mine")
    (folder / "own").mkdir()
    (folder / "own" / "deep.txt").write_text("mine too")
    shutil.rmtree(folder / "variant")
    run(quick(), model=str(bert), output=tmp_path, device="cpu")
    run(quick(), model=str(bert), output=tmp_path, device="cpu", fresh=True)
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "own", "recipe.yaml", "record.json", "variant"]
    assert (folder / "own" / "deep.txt").read_text() == "mine too"
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        run(quick(), model=str(bert), output=tmp_path, device="cpu", fresh=True)
    assert (tmp_path / "elsewhere" / "record.json").exists()


def test_clearing_up_after_the_commit_may_be_interrupted(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tidy", lambda final, kept: stopped() if (final / "journal").exists() else None)
        with pytest.raises(KeyboardInterrupt):
            run(quick(export=[]), model=str(bert), output=tmp_path, device="cpu")
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["journal", "recipe.yaml", "record.json", "variant"]
    run(quick(export=[]), model=str(bert), output=tmp_path, device="cpu")
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "record.json"]


def test_a_run_that_another_process_works_at_is_left_to_it(bert: Path, tmp_path: Path) -> None:
    name = pipeline._Run(quick(model=str(bert)), tmp_path, "cpu", print).name
    with locked(tmp_path / f".{name}.lock", "run"), pytest.raises(UserError, match=rf"run {name}: in use by pid \d+ on ") as caught:
        run(quick(), model=str(bert), output=tmp_path, device="cpu")
    assert "--wait" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_the_journal_makes_each_part_once(tmp_path: Path) -> None:
    journal, made = Journal(tmp_path), []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    assert journal.once("a b/c", make) == journal.once("a b/c", make) == {"value": 1}
    assert json.loads(next(tmp_path.iterdir()).read_text()) == {"value": 1}
    with pytest.raises(ZeroDivisionError):
        journal.once("d", lambda: {"value": 1 // 0})
    assert len(list(tmp_path.iterdir())) == 1


def test_other_layouts_are_written_beside_the_variant_and_a_refusal_costs_nothing(bert: Path, tmp_path: Path) -> None:
    steps = [{"method": "rtn", "bits": 4, "group_size": 16, "activations": "none"}]
    recipe = {**SMALL, "steps": steps, "measure": {"what": []}, "evaluate": {"tasks": []}}
    record = run(
        parse_recipe({**recipe, "export": ["variant", "compressed-tensors"]}), model=str(bert), output=tmp_path, device="cpu"
    )
    config = json.loads((tmp_path / record.run / "compressed-tensors" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    shutil.rmtree(tmp_path / record.run)
    refused = parse_recipe({**recipe, "export": ["variant", "gptq"]})  # its readers want widths that are multiples of 32
    with pytest.raises(UserError, match="encoder"):
        run(refused, model=str(bert), output=tmp_path, device="cpu")
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["recipe.yaml", "record.json", "variant"]
