"""A recipe that trains a model for all depths, from end to end: what its record says of each depth."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from compress.cli import app
from compress.data.texts import suite_texts
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.measure.record import Record
from compress.models.files.variant import VariantInfo
from compress.pipeline import measuring
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run

TASKS = ("MiniSTS",)


class Killed(Exception):
    pass


def test_the_record_says_what_each_depth_keeps(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text.replace("\n", " ") for text in suite_texts()))
    training = {"texts": str(texts), "count": 100, "held_out": 40, "steps": 2, "batch": 16, "every": 2, "precision": "no"}
    recipe = parse_recipe(
        {
            "name": "elastic",
            "steps": [{"method": "distill", "depth": "any", "learning_rate": 1e-3, **training}],
            "measure": {"what": ["fidelity"], "count": 24},
            "evaluate": {"tasks": list(TASKS)},
        }
    )

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:  # killed after the cut was written, before it was measured
        patch.setattr(measuring, "weight_bytes", die)
        with pytest.raises(Killed):
            run(recipe, model=str(bert), output=tmp_path / "runs", device="cpu", say=lambda _: None)
    record = run(recipe, model=str(bert), output=tmp_path / "runs", device="cpu", say=lambda _: None)
    folder = tmp_path / "runs" / record.run
    assert Record.read(folder).depths == record.depths
    assert [row.depth for row in record.depths] == [1, 2]
    one, whole = record.depths
    assert one.size_bytes < whole.size_bytes == record.row("variant").size_bytes
    assert (whole.retained, whole.cosine_mean, whole.overall) == (record.retained, record.fidelity.cosine_mean, record.overall)  # type: ignore[union-attr]
    assert set(record.steps[0].found["curve"][-1]) >= {"cosine", "cosine_1"}
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()] == [record.run]

    # What the record says of a depth is what its export gives.
    result = CliRunner().invoke(app, ["export", str(folder), "--depth", "1", "--to", str(tmp_path / "one")])
    assert result.exit_code == 0, result.output
    assert VariantInfo.read(tmp_path / "one").layers == (0,)
    (again,) = evaluate(str(tmp_path / "one"), list(TASKS), EvaluationOptions()).tasks
    assert one.scores == {"MiniSTS": pytest.approx(again.variant, abs=1e-6)}
    assert one.retained == pytest.approx(again.variant / record.tasks[0].baseline)
    assert one.cosine_mean is not None
    assert one.cosine_mean < 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([], "export takes a --format"),
        (["--depth", "1", "--push", "me/model"], "a variant has no card"),
        (["--depth", "1"], "holds no variant"),
    ],
)
def test_what_export_cannot_write_is_said(bert: Path, tmp_path: Path, asked: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["export", str(bert), "--to", str(tmp_path / "x"), *asked])
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output
