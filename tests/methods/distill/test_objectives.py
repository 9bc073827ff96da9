"""Objectives with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.methods.distill import objectives
from compress.methods.distill.objectives import OBJECTIVES, hidden, matryoshka


def vectors(seed: int, width: int = 12) -> torch.Tensor:
    return torch.randn(9, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_least_where_student_and_teacher_agree(name: str) -> None:
    teacher, other = vectors(0), vectors(1)
    assert float(OBJECTIVES[name](teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(OBJECTIVES[name](other, teacher)) > 1e-3
    student = other.clone().requires_grad_()
    OBJECTIVES[name](student, teacher).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("name", ["similarity", "ranking_kl", "margin"])
def test_what_compares_similarities_does_not_see_a_rotation_or_a_width(name: str) -> None:
    teacher = vectors(0)
    turn = torch.linalg.qr(torch.randn(20, 12, generator=torch.Generator().manual_seed(3))).Q
    assert float(OBJECTIVES[name](teacher @ turn.t(), teacher)) == pytest.approx(0, abs=1e-5)
    assert float(objectives.cosine(teacher @ turn.t()[:, :12], teacher)) > 0.1


def test_objectives_have_the_values_that_their_formulas_give() -> None:
    student, teacher = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 2]])
    assert float(objectives.cosine(student, teacher)) == pytest.approx(1 / 3)
    assert float(objectives.mse(student, teacher)) == pytest.approx((0 + 2 + 1) / 3)
    assert float(objectives.similarity(student, teacher)) == pytest.approx(2 / 6)  # one pair of three differs by 1, both ways
    soft = torch.tensor([[20.0, 0], [20, 0], [0, 0]]).softmax(dim=1)
    expected = (soft * (soft / 0.5).log()).nan_to_num().sum(dim=1).mean()
    assert float(objectives.ranking_kl(student, teacher)) == pytest.approx(float(expected), rel=1e-4)
    assert float(objectives.margin(student, teacher)) == pytest.approx((0 + 1 + 0 + 1 + 0 + 0) / 6)


def test_matryoshka_asks_at_every_width() -> None:
    student, teacher = vectors(0), vectors(1)
    expected = np.mean([float(objectives.cosine(student[:, :width], teacher[:, :width])) for width in (12, 4, 8)])
    assert float(matryoshka(objectives.cosine, [4, 8])(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_hidden_states_of_padding_are_not_compared() -> None:
    teacher = torch.randn(2, 5, 8)
    student, mask = teacher.clone(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    student[0, 3:] = 100
    assert float(hidden([student], [teacher], mask)) == 0
    assert float(hidden([torch.zeros_like(teacher)], [teacher], mask)) == pytest.approx(1)
