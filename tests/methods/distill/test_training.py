"""The training loop: students that learn, and a loop that resumes where it was killed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from compress.common.errors import UserError
from compress.methods.distill.batches import TokenTexts
from compress.methods.distill.checkpoints import Checkpoints, read_curve
from compress.methods.distill.method import Distill
from compress.methods.distill.training import TrainingData, rate, train
from compress.models.network.pooling import TextHead, TokenPooling
from compress.models.text.spec import Pooling


def test_the_learning_rate_rises_and_falls() -> None:
    schedule = SimpleNamespace(steps=100, warmup=0.1)
    rates = [rate(schedule, step) for step in range(100)]  # type: ignore[arg-type]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001


class Bag(nn.Module):
    """A network of nothing but a table."""

    def __init__(self, seed: int, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(50, width)
        self.text_head = TextHead(TokenPooling([Pooling.MEAN]), normalize=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.table(input_ids))


def problem(width: int = 8) -> TrainingData:
    """Random texts, and the vectors that a bag of another seed gives them."""
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 50, size=generator.integers(1, 9)) for _ in range(400)]
    teacher = Bag(7, width).table.weight.detach().numpy()
    made = np.stack([teacher[row].mean(axis=0) for row in rows]).astype(np.float32)
    return TrainingData(TokenTexts(rows[80:], [0] * 320), made[80:], TokenTexts(rows[:80], [0] * 80), made[:80])


SETTINGS = Distill(
    texts="texts.txt", steps=400, batch=32, learning_rate=0.03, weight_decay=0.0, precision="no", every=100, objectives={"mse": 1.0}
)


def settings(**changes: object) -> Distill:
    return Distill(**{**SETTINGS.model_dump(), **changes})


def test_a_student_that_can_be_the_teacher_becomes_it(tmp_path: Path) -> None:
    student = Bag(1)
    train(student, problem(), settings(steps=2000, every=500), tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert [look["loss"] for look in curve] == sorted((look["loss"] for look in curve), reverse=True)
    assert curve[-1]["cosine"] > 0.999
    torch.testing.assert_close(student.table.weight.detach(), Bag(7).table.weight.detach(), atol=0.05, rtol=0)


def test_a_narrower_student_learns_through_a_map(tmp_path: Path) -> None:
    train(Bag(1), problem(width=12), settings(objectives={"cosine": 1.0}), tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert curve[0]["cosine"] < curve[-1]["cosine"]
    assert 0.7 < curve[-1]["cosine"] < 0.9999  # 8 of 12 dimensions


def test_a_narrower_student_without_a_map_is_judged_by_its_similarities(tmp_path: Path) -> None:
    train(Bag(1), problem(width=12), settings(objectives={"similarity": 1.0}), tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert "cosine" not in curve[0]
    assert 0.5 < curve[0]["correlation"] < curve[-1]["correlation"] < 1


def test_a_killed_training_gives_the_curve_of_one_that_was_not(tmp_path: Path) -> None:
    data, asked = problem(), settings(steps=60, every=20, accumulate=2, objectives={"cosine": 1.0, "similarity": 2.0})
    whole = Bag(1)
    train(whole, data, asked, tmp_path / "whole")
    expected = read_curve(tmp_path / "whole")

    class Killed(Exception):
        pass

    def die(_: str) -> None:
        raise Killed

    with pytest.raises(Killed):
        train(Bag(1), data, asked, tmp_path / "killed", say=die)
    assert [path.name for path in (tmp_path / "killed").glob("state-*")] == ["state-20.pt"]
    again = Bag(1)
    train(again, data, asked, tmp_path / "killed")
    curve = read_curve(tmp_path / "killed")
    for key in ("step", "loss", "cosine"):
        assert [look[key] for look in curve] == [look[key] for look in expected]
    assert torch.equal(again.table.weight, whole.table.weight)


def test_training_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    still = settings(learning_rate=1e-12, every=10, patience=3)
    said: list[str] = []
    train(Bag(1), problem(), still, tmp_path / "t", say=said.append)
    assert len(said) == len(read_curve(tmp_path / "t")) <= 5
    assert said[-1].endswith("no improvement in 3 evaluations, stopped")


def test_a_training_that_was_killed_after_it_had_stopped_early_is_over(tmp_path: Path) -> None:
    still = settings(learning_rate=1e-12, every=10, patience=1)
    stopped, again = Bag(1), Bag(1)
    train(stopped, problem(), still, tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    train(again, problem(), still, tmp_path / "t")
    assert read_curve(tmp_path / "t") == curve
    assert torch.equal(again.table.weight, stopped.table.weight)


def test_another_number_of_processes_goes_on_and_says_so(tmp_path: Path) -> None:
    run = Bag(0)
    optimizer = torch.optim.AdamW(run.parameters())
    curve = [{"step": 100, "loss": 0.1, "cosine": 0.9, "seconds": 1.0}]
    Checkpoints(run, optimizer, tmp_path, main=True, processes=2).keep(curve)
    said: list[str] = []
    assert Checkpoints(run, optimizer, tmp_path, main=True).resume(said.append) == curve
    assert said == ["up to step 100 the number of processes was 2, now it is 1: the same training, except for rounding"]
    Checkpoints(run, optimizer, tmp_path, main=True).keep(curve)
    Checkpoints(run, optimizer, tmp_path, main=True).resume(said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("curve.jsonl", b"{broken\n", "curve.jsonl, line 1: not JSON"),
        ("curve.jsonl", b'{"step": "x"}\n', "curve.jsonl, line 1: step: "),
        ("curve.jsonl", b"[1]\n", "curve.jsonl, line 1: "),
        ("curve.jsonl", b"\xff", "curve.jsonl: not UTF-8"),
        ("state-100.pt", b"half", "state-100.pt: the checkpoint cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    run = Bag(0)
    (tmp_path / "curve.jsonl").write_text('{"step": 100, "loss": 0.1, "cosine": 0.9, "seconds": 1.0}\n')
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Checkpoints(run, torch.optim.SGD(run.parameters()), tmp_path, main=True).resume()
