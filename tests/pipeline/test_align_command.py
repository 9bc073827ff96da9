"""`compress align` from two models to one sentence: the index may be kept, or everything is embedded again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from align_support import texts_file, turn, with_dense
from tests_support import by_words, encoded, folder_of, half_exact
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.common.errors import UserError
from compress.measure.doctor.diagnose import Options, diagnose
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.measure.record import Record
from compress.pipeline import align as align_module
from compress.pipeline.align import AlignOptions, align
from compress.reports.compare import compare_runs

QUIET = lambda _: None  # noqa: E731


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return texts_file(tmp_path_factory.mktemp("texts"), 400)


@pytest.fixture(scope="module")
def old(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return half_exact(by_words(Path(shutil.copytree(bert, tmp_path_factory.mktemp("old") / "old"))))


@pytest.fixture(scope="module")
def turned(old: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dense(old, tmp_path_factory.mktemp("turned") / "turned", turn(48))


@pytest.fixture(scope="module")
def kept(old: Path, turned: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, Path]:
    """A call that nobody disturbed, of the turned copy to what it was turned from, and its folder."""
    out = tmp_path_factory.mktemp("kept") / "out"
    return align(str(turned), str(old), out, AlignOptions(str(texts)), say=QUIET), out


def command(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    assert found.exception is None or isinstance(found.exception, SystemExit | UserError), found.exception
    return found.exit_code, found.output + (str(found.exception) if isinstance(found.exception, UserError) else "")


def test_a_turned_copy_keeps_the_index(old: Path, turned: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said = command("align", turned, "--to", old, "--texts", texts, "-o", out)
    assert code == 0
    assert re.search(r"you may keep your index: \d+\.\d \[\d+\.\d, \d+\.\d\] % of the scores of old are kept", said)
    record = Record.read(out)
    found = record.alignment
    assert found is not None
    (task,) = found.tasks
    assert (task.task, found.keep_index, found.wanted, found.fingerprint) == (
        "MiniRetrieval",
        True,
        0.97,
        folder_of(old).fingerprint,
    )
    np.testing.assert_allclose(encoded(out), encoded(old), atol=1e-3)
    # Two queries may find their documents in another order: 16 bits of the map, and another CPU, round otherwise.
    assert task.new_on_old.value == pytest.approx(task.old_on_old.value, abs=4e-3)
    for score in (task.old_on_old, task.new_on_old, task.new_on_new):
        assert score.low is not None
        assert score.high is not None
        assert score.low < score.value < score.high
    own = evaluate(str(old), ["MiniRetrieval"], EvaluationOptions(), say=QUIET)
    assert task.old_on_old.value == own.tasks[0].variant
    assert task.new_on_new.value == evaluate(str(turned), ["MiniRetrieval"], EvaluationOptions(), say=QUIET).tasks[0].variant
    assert compress.load(out, device="cpu").dimension == 48
    assert not list(tmp_path.glob(".out*"))
    assert (out / "recipe.yaml").is_file()


def test_a_model_that_keeps_too_little_says_re_embed(make_model, old: Path, texts: Path, tmp_path: Path) -> None:
    other = make_model("distilbert")
    code, said = command("align", other, "--to", old, "--texts", texts, "-o", tmp_path / "out", "--min-kept", "99")
    assert code == 1
    assert re.search(r"^(re-embed|not settled, so re-embed or measure on more queries): \d+\.\d \[", said, re.M)
    record = Record.read(tmp_path / "out")
    assert record.alignment is not None
    assert record.alignment.keep_index is False
    assert [gate.kept for gate in record.gates] == [False]


def test_the_lower_end_of_the_interval_decides(old: Path, kept: tuple[Record, Path]) -> None:
    from compress.measure.accuracy.score import TaskScore, score_task
    from compress.measure.accuracy.tasks import find_tasks
    from compress.measure.alignment import CrossScores, judge, said

    (task,) = find_tasks(["MiniRetrieval"], None)
    own = score_task(compress.load(old, device="cpu"), task)
    values = np.array(own.examples.parts[0].values[0])
    own = own.model_copy(update={"score": float(values.mean())})  # mteb rounds it
    worse = values * np.where(np.arange(len(values)) % 4, 1, 0.8)  # a quarter of the queries lose a fifth
    less = own.model_copy(
        update={
            "score": float(worse.mean()),
            "examples": own.examples.model_copy(
                update={"parts": (own.examples.parts[0].model_copy(update={"values": [worse.tolist()]}),)}
            ),
        }
    )

    def judged(wanted: float, crossed: TaskScore = less) -> str:
        found = judge(folder_of(old), CrossScores({"t": own}, {"t": crossed}, {"t": own}), wanted)
        return said(found).partition(":")[0]

    share = worse.mean() / values.mean()
    found = judge(folder_of(old), CrossScores({"t": own}, {"t": less}, {"t": own}), 0.97).kept
    assert found.value == pytest.approx(share)
    assert found.low is not None
    assert found.high is not None
    assert judged(found.low - 0.001) == "you may keep your index"
    assert judged(found.low + 0.001) == "not settled, so re-embed or measure on more queries"
    assert judged(found.high + 0.001) == "re-embed"
    assert kept[0].verdict.startswith("you may keep")


def test_compare_reads_the_record_in_a_group_of_its_own(kept: tuple[Record, Path]) -> None:
    (group,) = compare_runs([kept[1].parent]).groups
    assert group.measured_on == "queries of turned on the index of old"
    (line,) = group.lines
    assert line.kept == pytest.approx(1, abs=0.02)


def test_a_call_that_was_stopped_continues(
    kept: tuple[Record, Path], old: Path, turned: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = align_module.make_variant

    def counted(*args: object) -> object:
        made.append("variant")
        return real(*args)  # type: ignore[arg-type]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(align_module, "make_variant", counted)
    with monkeypatch.context() as patch:
        patch.setattr(align_module, "judge", killed)
        with pytest.raises(KeyboardInterrupt):
            align(str(turned), str(old), tmp_path / "again", AlignOptions(str(texts)), say=QUIET)
    assert not (tmp_path / "again").exists()
    again = align(str(turned), str(old), tmp_path / "again", AlignOptions(str(texts)), say=QUIET)
    assert made == ["variant"]
    assert again.alignment == kept[0].alignment
    np.testing.assert_array_equal(encoded(tmp_path / "again", ["a parcel"]), encoded(kept[1], ["a parcel"]))


@pytest.mark.parametrize("runtime", ["torch", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_a_variant_is_aligned_in_its_own_runtime(old: Path, turned: Path, texts: Path, tmp_path: Path, runtime: str) -> None:
    pytest.importorskip(runtime)
    from compress.pipeline.recipe_file import parse_recipe
    from compress.pipeline.run import run

    recipe = {
        "name": "int8",
        "model": str(turned),
        "runtime": runtime,
        "steps": [{"method": "rtn", "bits": 4, "group_size": 16, "activations": "none"}],
    }
    made = run(parse_recipe(recipe), output=tmp_path / "runs", compress_only=True, say=QUIET)
    record = align(str(tmp_path / "runs" / made.run), str(old), tmp_path / "out", AlignOptions(str(texts)), say=QUIET)
    assert (record.model.name, record.rows[-1].runtime, record.rows[-1].weights) == ("turned", runtime, "int4-g16")
    info = folder_of(tmp_path / "out" / "variant").compressed
    assert [step["method"] for step in info.steps] == ["rtn", "align"]
    assert (info.base, info.base_fingerprint) == ("turned", folder_of(turned).fingerprint)
    assert record.alignment is not None
    assert record.alignment.to == "old"


def test_doctor_checks_the_index_s_model_by_its_files(kept: tuple[Record, Path], old: Path, copy_of) -> None:
    found = diagnose(str(kept[1]), Options(reference=str(old)))
    assert found.same
    assert "is aligned to old, and the reference is that model" in found.notes[0]
    other = copy_of(old)
    settings = other / "sentence_bert_config.json"
    settings.write_text(json.dumps({"max_seq_length": 40, "do_lower_case": False}))
    (other / "README.md").write_text("another card")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    found = diagnose(str(kept[1]), Options(reference=str(other)))
    assert [cause.name for cause in found.causes][:1] == ["another index"]
    assert "an index that it made is searched by another alignment" in found.causes[0].words


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tasks", "MiniSTS"], "task 'MiniSTS': is STS, and an index is searched"),
        (["--min-kept", "0"], "--min-kept 0: is a share in percent"),
        (["--map", "rotate"], "--map 'rotate' is not known"),
        (["--runtime", "numpy"], "static tables only"),
        (["--to", "random:nano"], "its weights are random"),
        (["--to", "minilmm"], "model 'minilmm'"),
        (["--texts", "nowhere.txt"], "nowhere.txt"),
        (["--count", "5"], "count"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(
    old: Path, turned: Path, texts: Path, tmp_path: Path, words: list[str], reason: str
) -> None:
    given = {"--to": str(old), "--texts": str(texts), "-o": str(tmp_path / "out")}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    code, said = command("align", turned, *(word for pair in given.items() for word in pair))
    assert code != 0
    assert reason in said
    assert not (tmp_path / "out").exists()


def test_a_router_is_refused_by_name(tmp_path: Path, old: Path, texts: Path) -> None:
    routed = tmp_path / "routed"
    shutil.copytree(old, routed)
    (routed / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Router"}])
    )
    (routed / "router_config.json").write_text(
        json.dumps(
            {
                "types": {"q": "sentence_transformers.models.Transformer", "d": "sentence_transformers.models.Transformer"},
                "structure": {"query": ["q"], "document": ["d"]},
                "parameters": {"default_route": "query", "allow_empty_key": True},
            }
        )
    )
    for name in "qd":
        shutil.copytree(old, routed / name)
    for new, other in ((routed, old), (old, routed)):
        with pytest.raises(UserError, match="Router"):
            align(str(new), str(other), tmp_path / "out", AlignOptions(str(texts)), say=QUIET)
