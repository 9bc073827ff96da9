"""The losses between a student and its teacher: one function each, from a batch's vectors in any float dtype to a float32 scalar.

Vectors are [texts, width], the student's and the teacher's of the same texts in the same order. Losses that compare vector with
vector need the same width on both sides; losses that compare similarities do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Temperature of the softmax over a batch's similarities. An embedder's cosines lie close together, so a higher temperature would
# make # the softmax nearly uniform.
TEMPERATURE = 0.05
# Objectives that compare a student's vector with the teacher's own.
VECTOR_OBJECTIVES = ("cosine", "mse")


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over texts of 1 - cosine of the two vectors: direction only, which is all that most uses look at.

    The cosine loss of Jasper (Zhang et al. 2024, arXiv 2412.19048); for unit vectors half of LEAF's squared distance (Vujanic and
    Rueckstiess 2025, arXiv 2509.12539).
    """
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over texts of the squared distance of the two vectors: length counts too.

    Used for multilingual students of an English teacher by Reimers and Gurevych 2020 (arXiv 2004.09813).
    """
    return (student.float() - teacher.float()).square().sum(dim=1).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of different texts in the batch of the squared difference of the two cosines.

    The similarity loss of Jasper (arXiv 2412.19048); RKD did the same with distances (Park et al. 2019, arXiv 1904.05068).
    """
    ours, theirs = (_cosines(vectors) for vectors in (student, teacher))
    return _off_diagonal((ours - theirs).square()).mean()


def ranking_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over texts of KL(teacher || student) between the softmaxes of the text's similarities to the others in the batch.

    Which texts are nearest counts more than how near they are (SEED: Fang et al. 2021, arXiv 2101.04731).
    """
    ours, theirs = (_off_diagonal(_cosines(vectors)) / TEMPERATURE for vectors in (student, teacher))
    return F.kl_div(ours.log_softmax(dim=1), theirs.log_softmax(dim=1), reduction="batchmean", log_target=True)


def margin(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of margins: how much closer each text is to its nearest neighbour than to every other text.

    The nearest neighbour is the teacher's. Most useful with hard negatives in the batch (margin-MSE: Hofstaetter et al. 2020, arXiv
    2010.02666).
    """
    ours, theirs = (_off_diagonal(_cosines(vectors)) for vectors in (student, teacher))
    nearest = theirs.argmax(dim=1, keepdim=True)
    margins = (similarities.gather(1, nearest) - similarities for similarities in (ours, theirs))
    ours, theirs = margins
    return (ours - theirs).square().mean()


OBJECTIVES: Mapping[str, Objective] = {function.__name__: function for function in (cosine, mse, similarity, ranking_kl, margin)}


def objectives_of(weights: Mapping[str, float], widths: Sequence[int]) -> dict[str, tuple[float, Objective]]:
    """Return a weight and a function for each named objective; with `widths`, each is also asked of those leading dimensions."""
    return {
        name: (weight, matryoshka(OBJECTIVES[name], widths) if widths else OBJECTIVES[name]) for name, weight in weights.items()
    }


def hidden(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Mean over layers and tokens of the squared difference of hidden states, relative to the teacher's mean square.

    Args:
        student: hidden states after some blocks, [texts, length, width] each.
        teacher: hidden states after the teacher's blocks that they should match.
        mask: int64 [texts, length], 1 for tokens.

    Patient knowledge distillation (Sun et al. 2019, arXiv 1908.09355). The caller decides which block matches which.
    """
    chosen = mask.bool()
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = ours[chosen].float(), theirs[chosen].float()
        losses.append((a - b).square().mean() / b.square().mean())
    return torch.stack(losses).mean()


def matryoshka(objective: Objective, widths: Sequence[int]) -> Objective:
    """Return an objective averaged over the full vectors and several numbers of leading dimensions, with equal weights.

    Matryoshka representation learning (Kusupati et al. 2022, arXiv 2205.13147, equation 1: a sum of losses over nested prefixes).
    The teacher's vectors are cut too if they are as wide as the student's. Otherwise the student's leading dimensions are compared
    with the teacher's full vectors.
    """

    def nested(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        same = student.shape[1] == teacher.shape[1]
        # The prefixes of the paper's set M, each with weight c_m = 1.
        cut = [objective(student[:, :width], teacher[:, :width] if same else teacher) for width in widths]
        return torch.stack([objective(student, teacher), *cut]).mean()

    return nested


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(vectors.float(), dim=1)
    return unit @ unit.t()


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """Drop the diagonal: [n, n] to [n, n - 1]."""
    count = len(matrix)
    return matrix.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
