"""Trainings in several processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_support import stored
from tests_support import compress_to

from compress.common.errors import UserError
from compress.methods.distill.checkpoints import read_curve
from compress.methods.distill.method import Distill
from compress.methods.prune.depth import Depth
from compress.methods.prune.sparsegpt import SparseGPT


@pytest.mark.parametrize("sharded", [pytest.param(False, marks=pytest.mark.slow), True])
def test_two_processes_learn_what_one_does(bert: Path, texts: Path, tmp_path: Path, sharded: bool) -> None:
    alone = Distill(texts=str(texts), held_out=40, steps=6, batch=16, every=3, learning_rate=1e-3, precision="no", processes=1)
    together = alone.model_copy(update={"processes": 2, "sharded": sharded})
    compress_to(bert, tmp_path / "one", Depth(drop=(1,)), alone)
    compress_to(bert, tmp_path / "two", Depth(drop=(1,)), together)
    one, two = (read_curve(tmp_path / f"{name}-journal" / "step-1") for name in ("one", "two"))
    assert [look["step"] for look in two] == [3, 6]
    for key in ("loss", "cosine"):
        assert [look[key] for look in two] == pytest.approx([look[key] for look in one], rel=1e-3)
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-3, rtol=0)


def test_a_process_that_fails_says_why(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no", processes=2, sharded=True)
    with pytest.raises(
        UserError, match=r"steps.1 \(distill\): process \d of 2: .* is pruned, which cannot be split among processes"
    ):
        compress_to(bert, tmp_path / "v", SparseGPT(pattern="2:4"), heal)
