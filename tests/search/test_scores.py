"""Scores of choices: derivatives against what is measured, layers without effect, and scorings that are stopped."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from search_support import FEW, scoring

from compress.search import scores
from compress.search.scores import loss_of, score
from compress.search.scoring import Around

EXACT = 1e-6


def test_the_loss_of_a_linear_model_is_exact_along_an_orthogonal_basis() -> None:
    jacobian = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    change = torch.randn(5, 11, generator=torch.Generator().manual_seed(2))
    # Directions with unit covariance: the axes, each as long as the root of their number.
    directions = torch.eye(7) * 7**0.5
    exact = float((jacobian @ change).square().sum(dim=0).mean()) / 2
    assert loss_of((directions @ jacobian @ change).tolist()) == pytest.approx(exact, rel=EXACT)


def test_random_directions_estimate_the_loss_of_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(7, 40, generator=generator)
    directions = torch.randn(400, 7, generator=generator)
    assert loss_of((directions @ change).tolist()) == pytest.approx(float(change.square().sum(dim=0).mean()) / 2, rel=0.1)


def test_derivatives_agree_with_what_is_measured_where_changes_are_small(bert: Path, tmp_path: Path) -> None:
    options = replace(FEW, choices=("int8",), directions=64)
    by_derivatives = score(scoring(bert, tmp_path / "a", options))
    measured = score(scoring(bert, tmp_path / "b", replace(options, forward=True)))
    assert by_derivatives.keys() == measured.keys()
    for group, losses in measured.items():
        if "int8" in losses:
            # 64 directions for 16 texts: a standard error of 5 % where all texts count the same
            assert by_derivatives[group]["int8"] == pytest.approx(losses["int8"], rel=0.4), group
            assert losses["int8"] > 1e-8


def test_a_layer_without_effect_scores_zero(bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layer.1.output.dense.weight"))
    weights[name] = torch.zeros_like(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    found = score(scoring(folder, tmp_path / "journal"))
    assert found["1.up"] == {"float16": 0.0, "int8": 0.0, "int4": 0.0, "int3": 0.0}
    assert found["0.up"]["int3"] > found["0.up"]["int4"] > found["0.up"]["int8"] > 0


def test_a_scoring_that_is_stopped_continues_and_ends_the_same(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(scoring(bert, tmp_path / "whole"))
    stopped = scoring(bert, tmp_path / "stopped")
    visited: list[int] = []
    visit = scores._Visitor.visit

    def stops(self: scores._Visitor, index: int, *rest: object) -> None:
        if index == 2 and len(visited) == 2:
            raise KeyboardInterrupt
        visited.append(index)
        visit(self, index, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scores._Visitor, "visit", stops)
    with pytest.raises(KeyboardInterrupt):
        score(stopped)
    assert visited == [0, 1]
    visited.append(-1)
    gradients = sorted((tmp_path / "stopped" / "gradients").iterdir())
    before = [path.stat().st_mtime_ns for path in gradients]
    assert score(stopped) == whole
    assert visited[3:] == [2]  # neither the table nor the first block is scored again
    assert [path.stat().st_mtime_ns for path in gradients] == before


def test_every_architecture_is_scored_streamed(nv_embed: Path, make_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    found = score(scoring(nv_embed, tmp_path / "nv", replace(FEW, choices=("int4", "dropped", "channels-50"))))
    assert found["head"]["int4"] > 0
    assert found["0.gate_up"]["int4"] > 0
    assert found["table"]["int4"] > 0
    assert found["1.block"]["dropped"] > 0
    assert found["1.block"]["channels-50"] > 0
    t5 = score(scoring(make_model("t5"), tmp_path / "t5", replace(FEW, choices=("int4", "dropped"))))
    assert set(t5["0.block"]) == {"float16"}  # only it has the table of position biases
    assert t5["2.block"]["dropped"] > 0


def test_around_a_variant_scores_are_changes_of_its_loss(bert: Path, tmp_path: Path) -> None:
    from compress.search.making import Maker
    from compress.search.prediction import tangent

    plain = scoring(bert, tmp_path / "plain")
    chosen = {group.name: "int4" for group in plain.choices if group.kind in ("qkv", "o", "up", "down")}
    texts = plain.texts.scored.texts
    maker = Maker(plain.source, plain.shape, plain.choices, plain.texts.calibration, texts, tmp_path / "made")
    base = maker.loss(chosen, keep=True)
    found = score(scoring(bert, tmp_path / "around", around=Around(maker.variant(chosen), chosen)))
    assert all(found[group]["int4"] == 0.0 for group in chosen)
    # GPTQ rounds the layers behind a group anew for what it makes, so that a single change is off by as much; all together are not.
    asked = [(group, choice) for group in chosen for choice in ("int3", "float16")]
    scored = np.array([found[group][choice] for group, choice in asked])
    changes = np.array([tangent(maker.loss({**chosen, group: choice})) - tangent(base) for group, choice in asked])
    assert np.corrcoef(scored, changes)[0, 1] > 0.95
    assert 0.6 < scored @ changes / (changes @ changes) < 1.6
