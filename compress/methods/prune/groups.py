"""Groups of a layer's inputs: which to drop, and what the others' weights become so that its outputs stay what they were.

With inputs x of mean m and covariance C (second moment where the layer has no bias) dropping inputs D and keeping S costs least
when `W_S' = W_S + W_D C_DS C_SS^-1` and the bias takes up the rest of the mean. What is left of the error then is
`tr(W_D (C^-1)_DD^-1 W_D^T)`, which is what a choice by error looks at (Hassibi and Stork 1993 for one weight).
"""

from __future__ import annotations

import torch

from compress.calibration.statistics import Hessian

# Groups go in so many rounds; within a round they are judged apart from one another.
ROUNDS = 32


class Spread:
    """Mean and second moment of a layer's inputs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._moment = Hessian(width + 1, device)

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        self._moment.add(torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1), counts)

    def about(self, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean [width] and the covariance [width, width]; zero and the second moment where `mean` is False."""
        moment = self._moment.mean()
        average = moment[-1, :-1].clone()
        if not mean:
            return torch.zeros_like(average), moment[:-1, :-1]
        return average, moment[:-1, :-1].addr_(average, average, alpha=-1)


def damped(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a covariance with a share of its mean diagonal added to its diagonal."""
    made = covariance.clone()
    made.diagonal().add_(damping * float(covariance.diagonal().mean()) or 1.0)
    return made


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return which scores are highest, int64 [keep], ascending."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def by_error(weight: torch.Tensor, covariance: torch.Tensor, groups: torch.Tensor, keep: int) -> torch.Tensor:
    """Choose what to keep by the error that dropping the rest leaves once all has been refitted.

    Args:
        weight: float32 [out, in].
        covariance: of the inputs, positive definite, float32 [in, in].
        groups: the inputs of each group, int64 [groups, size].
        keep: how many groups.

    Returns:
        The kept groups, int64 [keep], ascending.

    Raises:
        ValueError: the covariance has no Cholesky factor.
    """
    weight, inverse = weight.clone(), torch.cholesky_inverse(_factor(covariance))
    alive = torch.ones(len(groups), dtype=torch.bool, device=weight.device)
    goes = len(groups) - keep
    a_round = -(-goes // ROUNDS)
    while goes > 0:
        costs = _costs(weight, inverse, groups).masked_fill(~alive, torch.inf)
        lost = costs.argsort(stable=True)[: min(goes, a_round)]
        alive[lost] = False
        goes -= len(lost)
        inputs = groups[lost].flatten()
        solved = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])
        weight.addmm_(weight[:, inputs], solved, alpha=-1)
        inverse.addmm_(inverse[:, inputs], solved, alpha=-1)
    return alive.nonzero()[:, 0]


def _costs(weight: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the error that each group's going leaves, the others refitted: [groups]; nonsense where a group has gone."""
    if groups.shape[1] == 1:
        inputs = groups[:, 0]
        return weight[:, inputs].square().sum(dim=0) / inverse.diagonal()[inputs]
    costs = []
    for inputs in groups:
        block, columns = inverse[inputs][:, inputs], weight[:, inputs]
        solved, failed = torch.linalg.solve_ex(block, columns.t())
        costs.append((columns.t() * solved).sum() if not failed else columns.new_tensor(torch.inf))
    return torch.stack(costs)


def refitted(weight: torch.Tensor, covariance: torch.Tensor, undamped: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return what the weights of the kept inputs become: float32 [out, kept].

    Args:
        weight: float32 [out, in].
        covariance: of the inputs, positive definite.
        undamped: the same before anything was added to its diagonal; float32 [in, in].
        kept: the inputs that are kept, int64.

    Raises:
        ValueError: the covariance has no Cholesky factor.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    if not gone.any():
        return weight[:, kept]
    asked = (weight[:, gone] @ undamped[gone][:, kept]).t()
    made: torch.Tensor = weight[:, kept] + torch.cholesky_solve(asked, _factor(covariance[kept][:, kept])).t()
    return made


def _factor(covariance: torch.Tensor) -> torch.Tensor:
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        lower, failed = torch.linalg.cholesky_ex(covariance.double())
        lower = lower.float()
    if failed:
        raise ValueError("the covariance of its inputs is not positive definite; raise `damping`")
    made: torch.Tensor = lower
    return made
