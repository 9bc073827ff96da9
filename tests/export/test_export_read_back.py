"""What an export's own reader makes of it: its vectors are the variant's, and the card says so, with what was measured."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

import compress
from compress.common.errors import UserError
from compress.export import dense, export, reader
from compress.measure.record import RECORD_FILE, Record
from compress.methods.base import Method
from compress.methods.nv_embed.mean_pooling import MeanPooling
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.models.folder import ModelFolder
from compress.runtimes.torch_runtime import open_variant

RECORDED = Path(__file__).parents[2] / "results" / "int8-nano-d25c973e" / RECORD_FILE
TEXTS = ["", "a", "The Parcel never came", "of the many words " * 60, "🙂 日本語"]
FOUR = RTN(bits=4, group_size=16, activations="none")
PROMPT = {"query": "find: "}


@pytest.mark.parametrize(
    ("pooling", "normalize", "prompts", "format"),
    [
        ("mean", True, {}, "transformers"),
        *(
            pytest.param(pooling, normalize, prompts, format, marks=pytest.mark.slow)
            for format in ("transformers", "sentence-transformers")
            for pooling, normalize, prompts in (("mean", True, PROMPT), ("cls", False, PROMPT), ("lasttoken", True, {}))
        ),
    ],
)
def test_a_model_of_plain_transformers(
    make_model, make_variant, tmp_path: Path, pooling: str, normalize: bool, prompts: dict[str, str], format: str
) -> None:
    model = make_model("bert", pooling, normalize, prompts, include_prompt=pooling != "mean")
    said: list[str] = []
    out = export(make_variant(model, FOUR), format, tmp_path / "out", said.append)
    assert any("dequantized to half precision" in line for line in said)
    assert said[-1].startswith(f"Read back with {format} ")
    card = (out / "README.md").read_text()
    assert said[-1] in card
    assert (out / "modules.json").exists() == (format == "sentence-transformers")
    if prompts:  # and as the card says it, without a prompt
        (example,) = re.findall(r"```python\n(.*?)```", card, re.S)
        found = reader.run_example(out, reader.Reader(format, (), example), TEXTS, "")
        np.testing.assert_allclose(found, compress.load(str(tmp_path / "run"), device="cpu").encode(TEXTS, ""), atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["transformers", "sentence-transformers"])
def test_an_nv_embed_without_its_head(nv_embed: Path, make_variant, tmp_path: Path, format: str) -> None:
    run = make_variant(nv_embed, MeanPooling(), FOUR)
    said: list[str] = []
    out = export(run, format, tmp_path / "out", said.append)
    assert said[-1].startswith(f"Read back with {format} ")
    if format == "sentence-transformers":  # and through our own loader, prompt and end of text included
        prompt = "Instruct: Retrieve semantically similar text\nQuery: "
        expected = compress.load(str(run), device="cpu").encode(TEXTS, prompt)
        found = compress.load(str(out), device="cpu", dtype="float32").encode(TEXTS, prompt)
        np.testing.assert_allclose(found, expected, atol=2e-3)


@pytest.mark.parametrize("step", [RTN(bits=8), FP8()], ids=["int8", "fp8"])
def test_activations_are_left_alone_where_the_reader_leaves_them(bert: Path, make_variant, tmp_path: Path, step: Method) -> None:
    run = make_variant(bert, step)
    out = export(run, "sentence-transformers", tmp_path / "out", check=False)
    found = compress.load(str(out), device="cpu", dtype="float32").encode(TEXTS)
    alone = open_variant(ModelFolder("it", run / "variant"), device="cpu", activations=False).encode(TEXTS)
    np.testing.assert_allclose(found, alone, atol=2e-3)
    rounded = open_variant(ModelFolder("it", run / "variant"), device="cpu").encode(TEXTS)
    assert np.abs(rounded - alone).max() > 10 * np.abs(found - alone).max()


def test_other_vectors_are_refused(bert: Path, make_variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dense, "in_transformers", lambda spec: "def embed(texts, prompt):\n    return [[1.0] + [0.0] * 47] * len(texts)\n"
    )
    run = make_variant(bert, FOUR)
    with pytest.raises(UserError, match="transformers gives other vectors"):
        export(run, "transformers", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_not_there_is_said(bert: Path, make_variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "VERSIONS", "print('{}')")
    said: list[str] = []
    out = export(make_variant(bert, FOUR), "transformers", tmp_path / "out", said.append)
    reason = "Not read back: transformers, torch not installed when it was written."
    assert said[-1] == f"{reason} Give an interpreter that has them: --python."
    assert reason in (out / "README.md").read_text()


def test_a_model_that_does_not_fit_is_not_read_back(
    bert: Path, make_variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "available_memory_bytes", lambda: 10_000)
    said: list[str] = []
    export(make_variant(bert, FOUR), "transformers", tmp_path / "out", said.append)
    assert re.fullmatch(r"Not read back: that takes 0\.3 MB of memory, and .* were free\.", said[-1])


def test_what_is_no_python_is_refused(bert: Path, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a Python"):
        export(make_variant(bert, FOUR), "transformers", tmp_path / "out", python=tmp_path / "none")


def test_the_card_says_what_was_measured(bert: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(bert, FOUR)
    shutil.copy(RECORDED, run / RECORD_FILE)
    record = Record.read(run)
    out = export(run, "sentence-transformers", tmp_path / "out", check=False, licence="mit")
    card = (out / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "Not read back." in card
    for task in record.tasks:
        assert f"| {task.task} | {task.metric} | {100 * task.baseline:.2f} | {100 * task.variant:.2f} |" in card
    assert all(f"| {row.size_bytes / 1e6:,.1f} MB |" in card for row in record.rows)
    assert record.machine.cpu in card
    assert (out / "example.py").read_text() in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.S)
    assert json.loads(json.dumps(YAML(typ="safe").load(recipe))) == record.recipe
    rows = dict(re.findall(r"\| (\S+) \| [\d,]+ \| `([0-9a-f]{64})` \|", card))
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file() and path.name != "README.md"}
    assert rows == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def test_a_licence_is_not_changed(bert: Path, make_variant, tmp_path: Path) -> None:
    run = make_variant(bert, FOUR)
    described = run / "variant" / "variant.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {"licence": "cc-by-nc-4.0"}))
    with pytest.raises(UserError, match=r"under cc-by-nc-4.0"):
        export(run, "transformers", tmp_path / "out", licence="mit")
