"""A run on several ranks: two "nodes" of this machine, each with its own launcher, as docs/cluster.md says."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from distill_support import stored

import compress
from compress.common.errors import UserError
from compress.common.ranks import VARIABLES
from compress.measure.record import Record
from compress.methods.distill.method import Distill
from compress.pipeline.recipe_file import read_recipe

PATHS = ":".join(path for path in sys.path if path)
TIMEOUT = 600
"""Seconds until a rank that hangs fails a test."""
RECIPE = """
name: tiny
model: {model}
steps:
  - {{method: depth, drop: [1]}}
  - method: distill
    texts: {texts}
    held_out: 40
    steps: 60
    batch: 16
    every: 15
    learning_rate: 0.001
    max_tokens: 32
    objectives: {{cosine: 1.0, similarity: 10.0, ranking_kl: 0.1}}
    precision: "no"
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread a process, however it is started: the order of sums, and so the bytes, follow the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def recipe(bert: Path, texts: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=bert, texts=texts))
    return path


class Ranks:
    """Two ranks of a run, each a process of its own that knows the other by the launcher's variables alone."""

    def __init__(self, recipe: Path, runs: Path) -> None:
        port = free_port()
        arguments = [str(recipe), "--runs", str(runs), "--device", "cpu", "--compress-only"]
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "compress.cli", "run", *arguments],
                env=environment() | shared | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def ended(self) -> list[tuple[int, str]]:
        """The exit code of each rank and what it said of errors."""
        said = [process.communicate(timeout=TIMEOUT)[1] for process in self.processes]
        return [(process.returncode, text) for process, text in zip(self.processes, said, strict=True)]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"PYTHONPATH": PATHS}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def start() -> Iterator[Callable[[Path, Path], Ranks]]:
    started: list[Ranks] = []

    def go(recipe: Path, runs: Path) -> Ranks:
        started.append(Ranks(recipe, runs))
        return started[-1]

    yield go
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


def until_a_checkpoint(runs: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until a checkpoint of this step or a later one is there."""
    ends = time.monotonic() + TIMEOUT
    while time.monotonic() < ends and process.poll() is None:
        # The curve names the checkpoint that counts; it is written after that checkpoint's file.
        if any(f'"step": {step}' in path.read_text() for path in runs.glob(".tiny-*.partial/journal/**/curve.jsonl")):
            return
        time.sleep(0.005)
    raise AssertionError(f"no checkpoint of step {step}: {process.communicate()[1] if process.poll() is not None else ''}")


def record_in(runs: Path) -> Record:
    (path,) = runs.glob("tiny-*/record.json")
    return Record.read(path.parent)


def weights_in(runs: Path) -> bytes:
    (path,) = runs.glob("tiny-*/variant/model.safetensors")
    return path.read_bytes()


def curve_of(record: Record) -> list[dict[str, float]]:
    curve: list[dict[str, float]] = record.steps[-1].found["curve"]
    return curve


def torchrun(recipe: Path, runs: Path) -> list[subprocess.Popen[str]]:
    """Two "nodes", each with a launcher of its own."""
    port = free_port()
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
                *("--node-rank", str(node), "--rdzv-endpoint", f"127.0.0.1:{port}", "-m", "compress.cli", "run", str(recipe)),
                *("--runs", str(runs), "--device", "cpu", "--compress-only"),
            ],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


@pytest.mark.slow  # test_job has two processes that learn what one does
@pytest.mark.parametrize("launched", [False, True], ids=["ranks", "torchrun"])
def test_two_nodes_learn_what_one_process_does(
    recipe: Path, tmp_path: Path, start: Callable[[Path, Path], Ranks], launched: bool
) -> None:
    launchers = torchrun(recipe, tmp_path / "two") if launched else start(recipe, tmp_path / "two").processes
    compress.run(recipe, output=tmp_path / "one", device="cpu", compress_only=True, say=lambda _: None)
    said = [launcher.communicate(timeout=TIMEOUT)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], said
    assert "record: " in said[0]  # the first rank alone shows the record
    assert "record: " not in said[1]
    one, two = (curve_of(record_in(tmp_path / name)) for name in ("one", "two"))
    assert [look["step"] for look in two] == [15, 30, 45, 60]
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    for key in ("loss", "cosine"):
        assert [look[key] for look in two] == pytest.approx([look[key] for look in one], rel=1e-4)
    variants = [next((tmp_path / name).glob("tiny-*/variant")) for name in ("one", "two")]
    first, second = (stored(variant) for variant in variants)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name].float(), tensor.float(), atol=2e-3, rtol=0)


@pytest.mark.slow  # six processes; kills of one are in test_training, two processes' equal bytes in test_job
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_rank_is_killed_the_run_goes_on_to_the_same_bytes(
    recipe: Path, tmp_path: Path, start: Callable[[Path, Path], Ranks], victim: int
) -> None:
    runs = tmp_path / "killed"
    ranks = start(recipe, runs)
    until_a_checkpoint(runs, ranks.processes[victim], 15)
    ranks.processes[victim].send_signal(signal.SIGKILL)
    ended = ranks.ended()
    assert ended[victim][0] == -signal.SIGKILL
    code, said = ended[1 - victim]
    assert code == 2
    assert "error: rank 1 of 2 on " in said
    assert ("rank 0 is gone" if victim == 0 else "is gone; it was killed") in said
    assert "continues at its last checkpoint" in said
    assert not list(runs.glob("tiny-*"))
    ended = start(recipe, runs).ended()
    assert [code for code, _ in ended] == [0, 0], ended
    assert "step 60 of 60" in ended[0][1]
    assert "step 15 of 60" not in ended[0][1]  # it went on
    # The same two processes, started by one and not killed.
    whole = read_recipe(recipe)
    steps = (whole.steps[0], whole.steps[1].model_copy(update={"processes": 2}))
    compress.run(
        whole.model_copy(update={"steps": steps}), output=tmp_path / "whole", device="cpu", compress_only=True, say=lambda _: None
    )
    assert weights_in(runs) == weights_in(tmp_path / "whole")
    ours, theirs = (curve_of(record_in(folder)) for folder in (runs, tmp_path / "whole"))
    for key in ("step", "loss", "cosine"):
        assert [look[key] for look in ours] == [look[key] for look in theirs]


@pytest.mark.slow  # Ray Train alone starts ten processes
def test_two_workers_of_ray_train_share_a_run(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.train.torch", reason="the extra `ray` is not installed")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from compress.scale.ray_workers import connected
    from compress.scale.units import RayOptions

    monkeypatch.setenv("PYTHONPATH", PATHS)  # of the workers

    def share(config: dict[str, str]) -> None:
        import compress

        compress.run(config["recipe"], output=config["runs"], device="cpu", compress_only=True)

    with connected(RayOptions(workers=3)):
        trainer = TorchTrainer(
            share,
            train_loop_config={"recipe": str(recipe), "runs": str(tmp_path / "two")},
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(storage_path=str(tmp_path / "ray")),
        )
        trainer.fit()
    compress.run(recipe, output=tmp_path / "one", device="cpu", compress_only=True, say=lambda _: None)
    one, two = (curve_of(record_in(tmp_path / name)) for name in ("one", "two"))
    for key in ("step", "loss", "cosine"):
        assert [look[key] for look in two] == pytest.approx([look[key] for look in one], rel=1e-4)


def ranks_say(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    values = {"RANK": 0, "WORLD_SIZE": count, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_what_ranks_cannot_share_is_refused_at_once(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks_say(monkeypatch, 3)
    with pytest.raises(UserError, match=r"steps.1 \(distill\): a batch of 16 cannot be shared evenly by 3 ranks"):
        compress.run(recipe, output=tmp_path / "runs")
    ranks_say(monkeypatch, 16)
    with pytest.raises(UserError, match="a batch of 16 is too small for 16 ranks"):
        compress.run(recipe, output=tmp_path / "runs")
    ranks_say(monkeypatch, 2)
    read = read_recipe(recipe)
    with pytest.raises(UserError, match="no step of the recipe trains") as caught:
        compress.run(read.model_copy(update={"steps": read.steps[:1]}), output=tmp_path / "runs")
    assert caught.value.hint == "run it without torchrun"
    train = read.steps[1]
    assert isinstance(train, Distill)
    fixed = train.model_copy(update={"processes": 4})
    with pytest.raises(UserError, match="`processes: 4`, and 2 ranks were started; leave it out"):
        compress.run(read.model_copy(update={"steps": (fixed,)}), output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
