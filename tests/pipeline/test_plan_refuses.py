"""`compress plan` refuses what `compress run` refuses, in the same words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tests_support import compress_to
from typer.testing import CliRunner

import compress
from compress.cli import app
from compress.common.errors import UserError

RECIPE = "steps:\n  - {method: rtn, bits: 8}\nevaluate: {tasks: []}\nmeasure: {what: []}\n"


def edited(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def no_pooling(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:1]))


def quantized(folder: Path) -> None:
    edited(folder / "config.json", quantization_config={"quant_method": "gptq"})


def one_tensor_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(next(name for name in tensors if name.endswith("attention.self.query.weight")))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reranker(folder: Path) -> None:
    edited(folder / "config.json", architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize("break_it", [no_pooling, quantized, one_tensor_less, reranker])
def test_a_broken_folder(bert: Path, copy_of, tmp_path: Path, break_it: Callable[[Path], None]) -> None:
    folder = copy_of(bert)
    break_it(folder)
    check_same_words(folder, tmp_path)


def test_a_variant(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "variant")
    check_same_words(tmp_path / "variant", tmp_path)


def check_same_words(folder: Path, place: Path) -> None:
    recipe = place / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(UserError) as caught:
        compress.run(recipe, model=str(folder), output=place / "runs")
    planned = CliRunner().invoke(app, ["plan", str(recipe), "--model", str(folder)])
    assert isinstance(planned.exception, UserError)
    assert planned.exception.message == caught.value.message
