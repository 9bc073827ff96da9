"""Graphs for a runtime alone: the card's example, run without this package, gives the variant's vectors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from align_support import turn, with_dense
from tests_support import compress_to

import compress
from compress.common.errors import UserError
from compress.export import export, graphs
from compress.export.reader import Reader, run_example
from compress.methods.nv_embed.fold import Fold
from compress.methods.prune.sparsegpt import SparseGPT
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.models.embedder import Embedder
from compress.models.files.variant import WEIGHTS_FILE

TEXTS = ["", "a", "The Parcel never came", "of the many words " * 60, "🙂 日本語"]
FOUR = GPTQ(bits=4, group_size=16)


def example_of(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    return str(code)


@pytest.fixture
def variant(request: pytest.FixtureRequest, make_model, tmp_path: Path) -> Callable[[str], Path]:
    """Make the run of a kind of model in four bits."""

    def make(kind: str) -> Path:
        if kind in ("prompted", "dense"):
            model = make_model("bert", "mean", True, {"query": "find: "}, False)
        else:
            model = request.getfixturevalue(kind)
        if kind == "dense":
            model = with_dense(model, tmp_path / "dense", turn(48))
        run = tmp_path / "run"
        run.mkdir()
        compress_to(model, run / "variant", *([Fold()] if kind == "nv_embed" else []), FOUR)
        return run

    return make


def check_folder(out: Path, format: str, embedder: Embedder) -> None:
    settings = json.loads((out / "embedder.json").read_text())
    assert settings["dimension"] == embedder.dimension
    assert settings["prompts"] == embedder.spec.prompts
    assert not (out / "variant.json").exists()
    assert (out / WEIGHTS_FILE).exists() == (format == "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
@pytest.mark.parametrize("kind", ["bert", "prompted", "nv_embed", "decoder"])
def test_the_card_s_example_gives_the_variant_s_vectors(variant, tmp_path: Path, kind: str, format: str) -> None:
    runtime = {"onnx": "onnxruntime"}.get(format, format)
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    run, said = variant(kind), list[str]()
    out = export(run, format, tmp_path / "out", said.append)
    assert said[-1].startswith(f"Read back with {runtime} ")
    embedder = compress.load(str(run), runtime=runtime)
    prompt = next(iter(embedder.spec.prompts.values()), "") if kind != "decoder" else ""
    for given in {"", prompt}:
        found = run_example(out, Reader(runtime, (), example_of(out)), TEXTS, given)
        np.testing.assert_allclose(found, embedder.encode(TEXTS, given), atol=2e-5)
    check_folder(out, format, embedder)


def test_the_card_s_example_gives_them_in_this_process(variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, with a module after the pooling, without processes of their own for the example and for reading back."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    out = export(variant("dense"), "onnx", tmp_path / "out", check=False)
    embedder = compress.load(str(tmp_path / "run"), runtime="torch", device="cpu")
    monkeypatch.chdir(out)
    names: dict[str, Any] = {"__name__": "example"}
    exec(example_of(out), names)
    for given in ("", "find: "):
        np.testing.assert_allclose(names["embed"](TEXTS, given), embedder.encode(TEXTS, given), atol=2e-5)
    check_folder(out, "onnx", embedder)


@pytest.mark.slow
def test_vectors_that_differ_are_noticed(bert: Path, make_variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = graphs.IN_ONNXRUNTIME | {"running": 'return session.run(None, dict(zip(settings["inputs"], [ids, ids * 0 + 1])))[0]'}
    monkeypatch.setattr(graphs, "IN_ONNXRUNTIME", wrong)
    with pytest.raises(UserError, match="onnxruntime gives other vectors"):
        export(make_variant(bert, RTN(activations="none")), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_graph_cannot_hold_is_refused(bert: Path, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="onnxruntime"):
        export(make_variant(bert, FP8()), "onnx", tmp_path / "out")


def test_sparse_files_are_refused(bert: Path, make_variant, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without its zeros"):
        export(make_variant(bert, SparseGPT(sparsity=0.75)), "onnx", tmp_path / "out")
