"""What a student is asked to do like its teacher: one function each, of a batch's vectors in any float dtype to a float32 scalar.

Vectors are [texts, width], the student's and the teacher's of the same texts in the same order. Those that compare vector with
vector want one width; those that compare similarities do not care.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional as F

Objective = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# Of the softmax over a batch's similarities: cosines of an embedder lie close together, and a cooler softmax sees only the nearest.
TEMPERATURE = 0.05


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each text's two vectors, mean: the direction alone, which is all that most uses look at.

    The first stage of Jasper (Zhang et al. 2024, arXiv 2412.19048); with unit vectors half of LEAF's squared distance (Vujanic and
    Rueckstiess 2025, arXiv 2509.12539).
    """
    return (1 - F.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of each text's two vectors, mean over texts: length counts too.

    Reimers and Gurevych 2020 (multilingual students of an English teacher, arXiv 2004.09813).
    """
    return (student.float() - teacher.float()).square().sum(dim=1).mean()


def similarity(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference of the two matrices of cosines within the batch, mean over pairs of different texts.

    The similarity loss of Jasper (arXiv 2412.19048); relational distillation of distances before it (Park et al. 2019, RKD, arXiv
    1904.05068).
    """
    ours, theirs = (_cosines(vectors) for vectors in (student, teacher))
    return _off_diagonal((ours - theirs).square()).mean()


def ranking_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL divergence of what each text's similarities to the others are after a softmax, teacher to student, mean over texts.

    Which others are nearest counts more than how near (Fang et al. 2021, SEED, arXiv 2101.04731).
    """
    ours, theirs = (_off_diagonal(_cosines(vectors)) / TEMPERATURE for vectors in (student, teacher))
    return F.kl_div(ours.log_softmax(dim=1), theirs.log_softmax(dim=1), reduction="batchmean", log_target=True)


def margin(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """How far each text's nearest other is nearer than the rest: squared difference of the two's margins, mean.

    Nearest by the teacher. It says something where a batch holds hard negatives, texts that the teacher too puts close (margin-MSE:
    Hofstaetter et al. 2020, arXiv 2010.02666).
    """
    ours, theirs = (_off_diagonal(_cosines(vectors)) for vectors in (student, teacher))
    nearest = theirs.argmax(dim=1, keepdim=True)
    margins = (similarities.gather(1, nearest) - similarities for similarities in (ours, theirs))
    ours, theirs = margins
    return (ours - theirs).square().mean()


OBJECTIVES: Mapping[str, Objective] = {function.__name__: function for function in (cosine, mse, similarity, ranking_kl, margin)}


def hidden(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Squared difference of hidden states over the teacher's mean square, mean over layers and tokens.

    Args:
        student: hidden states behind some blocks, [texts, length, width] each.
        teacher: those behind the teacher's blocks that they are to be like.
        mask: int64 [texts, length], 1 for tokens.

    Sun et al. 2019 (patient distillation, arXiv 1908.09355); which block follows which is the caller's: by the blocks' original
    numbers where the student is what is left of the teacher.
    """
    chosen = mask.bool()
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        a, b = ours[chosen].float(), theirs[chosen].float()
        losses.append((a - b).square().mean() / b.square().mean())
    return torch.stack(losses).mean()


def matryoshka(objective: Objective, widths: Sequence[int]) -> Objective:
    """Ask for an objective at several numbers of leading dimensions too, all alike (Kusupati et al. 2022, arXiv 2205.13147).

    The teacher's vectors are cut as well where they are as wide as the student's; else the student's leading dimensions are asked
    to have the similarities of the teacher's whole vectors.
    """

    def nested(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        same = student.shape[1] == teacher.shape[1]
        cut = [objective(student[:, :width], teacher[:, :width] if same else teacher) for width in widths]
        return torch.stack([objective(student, teacher), *cut]).mean()

    return nested


def _cosines(vectors: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(vectors.float(), dim=1)
    return unit @ unit.t()


def _off_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """Leave the diagonal out: [n, n] to [n, n - 1]."""
    count = len(matrix)
    return matrix.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)
