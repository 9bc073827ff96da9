"""The scripts of `examples/` run as they are, on a tiny model, and say what is true."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import compress
from compress.data.texts import suite_texts
from compress.models.source import find

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import choose_by_a_bound  # noqa: E402
import serve_and_search  # noqa: E402
import shrink_your_own  # noqa: E402

SMALL = "60kB"
"""Of the 90 kB of the tiny model in half precision."""


class ExactIndex:
    """What the examples call of FAISS, in numpy, where it is not installed."""

    def __init__(self, dimension: int) -> None:
        self.rows = np.zeros((0, dimension), np.float32)

    def add(self, rows: np.ndarray) -> None:
        self.rows = np.vstack([self.rows, rows])

    def search(self, asked: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        scores = asked @ self.rows.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return np.take_along_axis(scores, order, axis=1), order


@pytest.fixture
def faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import faiss as _  # noqa: F401
    except ModuleNotFoundError:
        stand_in = ModuleType("faiss")
        stand_in.IndexFlatIP = ExactIndex  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "faiss", stand_in)


@pytest.fixture(scope="session")
def own_model(make_model: Callable[..., Path]) -> Path:
    """A tiny BERT with a prompt for queries, and a card that names its licence."""
    folder = make_model("bert", prompts={"query": "query: ", "document": ""})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.mark.slow
def test_shrink_your_own(
    own_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = shrink_your_own.RECIPE.read_text().replace("group_size: 64", "group_size: 16")  # its layers have 48 inputs
    (tmp_path / "small.yaml").write_text(small)
    monkeypatch.setattr(shrink_your_own, "RECIPE", tmp_path / "small.yaml")
    texts = suite_texts()[:24]
    shrunk = shrink_your_own.shrink(str(own_model), tmp_path, texts, ["MiniSTS"])
    said = capsys.readouterr().out
    old, new = compress.load(str(own_model)).encode(texts), compress.load(str(tmp_path / shrunk.record.run)).encode(texts)
    np.testing.assert_allclose(shrunk.cosines, (old * new).sum(axis=1), atol=1e-5)  # both are of unit length
    assert 0.9 < shrunk.cosines.min() < 1 - 1e-5  # four bits change every vector, and not much
    assert f"lowest {shrunk.cosines.min():.4f}" in said
    (row,) = shrunk.record.tasks
    assert f"MiniSTS: cosine_spearman {100 * row.baseline:.2f} -> {100 * row.variant:.2f}" in said
    assert "fits      yes" in said
    assert {path.name for path in shrunk.exported.iterdir()} >= {"README.md", "example.py"}


def test_choose_by_a_bound(own_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scoring = replace(choose_by_a_bound.OPTIONS.scoring, count=24, scored=16, max_tokens=40)
    few = replace(choose_by_a_bound.OPTIONS, scoring=scoring, trials=2, candidates=1, points=3)
    record = choose_by_a_bound.choose(str(own_model), SMALL, tmp_path, few, ("MiniSTS",))
    said = capsys.readouterr().out
    size = record.row("variant").size_bytes
    assert size <= 60_000
    assert record.retained is not None
    assert f"{size / 1e6:.2f} MB keep {100 * record.retained:.2f} %" in said
    half = find(str(own_model)).shape_to_compress.half_bytes
    assert f"gate size_ratio: {size / half:.4f}, bound {60_000 / half:.4f}: kept\n" in said
    assert (tmp_path / "bounded.yaml").exists()
    assert (tmp_path / record.run / "record.json").exists()


@pytest.mark.parametrize("client", [pytest.param("openai", marks=pytest.mark.slow), "urllib"])
def test_serve_and_search(client: str, own_model: Path, faiss: None, monkeypatch: pytest.MonkeyPatch) -> None:
    if client == "openai":
        pytest.importorskip("openai", reason="openai is not installed; the extra `dev` has it")
    else:
        monkeypatch.setitem(sys.modules, "openai", None)  # as where it is not installed
    texts, query = list(suite_texts()[:40]), suite_texts()[50]
    monkeypatch.setattr(serve_and_search, "embed", partial(serve_and_search.embed, at_once=16))
    found = serve_and_search.search(str(own_model), query, texts, top=3)
    model = compress.load(str(own_model))
    scores = model.encode(texts) @ model.encode([query], task="query")[0]
    assert [text for _, text in found] == [texts[row] for row in np.argsort(-scores)[:3]]
    np.testing.assert_allclose([score for score, _ in found], np.sort(scores)[::-1][:3], atol=1e-5)


def test_a_server_that_does_not_start_says_why(faiss: None, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"error: .*nothing"):
        serve_and_search.search(str(tmp_path / "nothing"), "a", ["b"])


def test_without_faiss_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(SystemExit, match="pip install faiss-cpu"):
        serve_and_search.search("nano", "a", ["b"])
