"""Groups of a layer's inputs: which to drop, and how to refit the other weights so that the outputs change least.

Let the inputs x have mean m and covariance C (the second moment if the layer has no bias). If inputs D are dropped and S are kept,
the least-squares refit is `W_S' = W_S + W_D C_DS C_SS^-1`, and the bias takes up the difference of the means. The error that
remains is `tr(W_D ((C^-1)_DD)^-1 W_D^T)`, by which groups are chosen: the optimal brain surgeon (Hassibi and Stork 1993, for one
weight) for whole groups of inputs, as in ZipLM (Kurtic et al. 2023, arXiv 2302.04089, algorithm 1).
"""

from __future__ import annotations

import torch

from compress.calibration.statistics import Hessian

# Groups are dropped in this many rounds; within a round their costs are computed independently. ZipLM drops one group per round.
ROUNDS = 32


class Spread:
    """Mean and second moment of a layer's inputs."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._moment = Hessian(width + 1, device)

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows [n, width] with the weight of each, float32 [n]."""
        self._moment.add(torch.cat((rows, rows.new_ones(len(rows), 1)), dim=1), counts)

    def about(self, *, mean: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean, float32 [width], and the covariance, float32 [width, width].

        If `mean` is False, these are zeros and the second moment.
        """
        moment = self._moment.mean()
        average = moment[-1, :-1].clone()
        if not mean:
            return torch.zeros_like(average), moment[:-1, :-1]
        return average, moment[:-1, :-1].addr_(average, average, alpha=-1)


def damped(covariance: torch.Tensor, damping: float) -> torch.Tensor:
    """Return a covariance with `damping` times the mean of its diagonal added to the diagonal."""
    made = covariance.clone()
    made.diagonal().add_(damping * float(covariance.diagonal().mean()) or 1.0)
    return made


def highest(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Return the indices of the `keep` highest scores, int64 [keep], ascending."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


def by_error(weight: torch.Tensor, covariance: torch.Tensor, groups: torch.Tensor, keep: int) -> torch.Tensor:
    """Choose the groups to keep so that dropping the others and refitting leaves a small error (ZipLM, algorithm 1).

    Args:
        weight: float32 [out, in].
        covariance: covariance of the inputs, positive definite, float32 [in, in].
        groups: the inputs of each group, int64 [groups, size].
        keep: number of groups to keep.

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
        # S: the structures whose removal adds least error
        costs = _costs(weight, inverse, groups).masked_fill(~alive, torch.inf)
        lost = costs.argsort(stable=True)[: min(goes, a_round)]
        alive[lost] = False
        goes -= len(lost)
        inputs = groups[lost].flatten()
        solved = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])
        # W <- W - W_:,S ((H^-1)_SS)^-1 (H^-1)_S,:
        weight.addmm_(weight[:, inputs], solved, alpha=-1)
        # H^-1 <- H^-1 - (H^-1)_:,S ((H^-1)_SS)^-1 (H^-1)_S,:
        inverse.addmm_(inverse[:, inputs], solved, alpha=-1)
    return alive.nonzero()[:, 0]


def _costs(weight: torch.Tensor, inverse: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Return the error that dropping each group adds after a refit, sum_i W_i,S ((H^-1)_SS)^-1 W_i,S^T: float32 [groups].

    Entries of groups that are dropped already have no meaning.
    """
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
    """Return the refitted weights of the kept inputs, W_S + W_D C_DS C_SS^-1: float32 [out, kept].

    Args:
        weight: float32 [out, in].
        covariance: covariance of the inputs, positive definite, float32 [in, in].
        undamped: the same without damping.
        kept: the inputs that are kept, int64 [kept].

    Raises:
        ValueError: the covariance has no Cholesky factor.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    if not gone.any():
        return weight[:, kept]
    # (W_D C_DS)^T, then the solution for C_SS by its Cholesky factor
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
