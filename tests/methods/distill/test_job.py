"""Trainings in several processes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distill_support import stored
from tests_support import compress_to, folder_of

from compress.common.errors import UserError
from compress.common.ranks import Place
from compress.methods.distill.checkpoints import read_curve
from compress.methods.distill.job import _take_part, _threads, learn
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


def test_a_rank_with_other_files_of_the_model_does_not_train(bert: Path, tmp_path: Path) -> None:
    def part(fingerprint: str, model: Path, targets: Path) -> None:
        job = SimpleNamespace(published=folder_of(model), targets=targets)
        _take_part(job, 1, fingerprint, SimpleNamespace(place=Place(1, 2, 0, 1)))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"does not hold the files of tiny that rank 0 has there"):
        part("another", bert, bert)
    with pytest.raises(ValueError, match=r"does not hold the files of tiny that rank 0 has there"):
        part("another", tmp_path / "nowhere", bert)
    with pytest.raises(ValueError, match=r"targets.npy is not there; all machines have to share the folder of runs"):
        part(folder_of(bert).fingerprint, bert, tmp_path / "targets.npy")


def test_ranks_share_nothing_but_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=r"this is rank 1 of 2 on .*, and only `compress run` shares a training"):
        learn(SimpleNamespace(processes=1), print)  # type: ignore[arg-type]


def test_threads_are_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for asked, processes, threads in ((None, 2, 4), ("1", 2, 1), ("6", 2, 4), ("no", 16, 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", asked) if asked else monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert _threads(processes) == threads
