"""SparseGPT: weights are removed one input channel after another, and the remaining ones make up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.methods.error_feedback import FeedbackMethod
from compress.methods.prune.base import PruneWeights, lowest, lowest_in_groups
from compress.models.files.headers import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.methods.error_feedback import Feedback
    from compress.models.network.segments import Parts

# Number of input channels for which the weights to remove are chosen together (B_s of the paper, here also its B), and of output
# channels that are worked on at once.
BLOCK, ROWS = 128, 4_096


class SparseGPT(FeedbackMethod, PruneWeights):
    """Prune linear layers so that their outputs on calibration texts change least.

    Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1, written as linear feedback like GPTQ here: each channel receives the
    errors of the channels before it; a weight that stays takes the feedback on in full, a weight that is removed leaves an error of
    its own. Which weights to remove is decided per block of channels, or per group of a pattern, from the weights as updated by
    then: those whose removal costs least.
    """

    method: Literal["sparsegpt"] = "sparsegpt"

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Return the operations of Cholesky factors and feedback; layers that share an input are counted as if they did not."""
        return sum(info.shape[1] ** 3 / 3 + info.shape[0] * info.shape[1] ** 2 for info in linears)

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`.

        Raises:
            ValueError: a layer's second moment has no Cholesky factor even in float64.
        """
        # Channels in their own order, so that a pattern's neighbours are in one block.
        for names, _, feedback in self.feedbacks(parts, linears, inputs, act_order=False):
            for name in names:
                weight, wanted = linears[name].weight, self.sparsity_of(name)
                weight.data = prune_with_feedback(weight.detach().float(), feedback, wanted.share, wanted.group).to(weight.dtype)


def prune_with_feedback(weight: torch.Tensor, feedback: Feedback, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    """Prune a weight, float32 [out, in], and return it with the remaining weights changed.

    With errors E = W - V of the new weight V the output's squared error is sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2 (see
    `error_feedback`). A weight that stays becomes V_k = W_k + sum_{j<k} E_j U_jk, which costs nothing; removing it costs D_k times
    the square of that.
    """
    import torch

    made = torch.empty_like(weight)
    for first in range(0, len(weight), ROWS):
        rows = weight[first : first + ROWS].t().contiguous()  # transposed: a channel is a row, contiguous in memory
        made[first : first + ROWS] = _prune_rows(rows, feedback, sparsity, group).t()
    return made


def _prune_rows(exact: torch.Tensor, feedback: Feedback, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    """Prune some output channels by algorithm 1 of SparseGPT: W transposed, float32 [in, out], to V transposed.

    In the paper the weights themselves are updated. Here the same values are the sum of the exact weight and the feedback of all
    errors before it, `heard`; and D_k stands for the paper's 1 / [H^-1]_kk^2, where H^-1 is the Cholesky factor of the inverse.
    """
    import torch

    upper, heard = feedback.upper, exact.clone()
    for start in range(0, len(exact), BLOCK):  # for i = 0, B, 2B, ...
        stop = min(start + BLOCK, len(exact))
        costs = feedback.diagonal[start:stop, None]
        errors = torch.zeros(stop - start, exact.shape[1], device=exact.device)
        inner = upper[start:stop, start:stop].t().contiguous()
        gone = torch.zeros(errors.shape, dtype=torch.bool, device=exact.device)
        if group is None:
            # M: remove the share p of the block's weights with the smallest w^2 / [H^-1]_cc^2 ("adaptive mask
            # selection").
            gone = lowest(_if_kept(exact[start:stop], heard[start:stop], inner).square() * costs, sparsity)
        for place in range(stop - start):  # for j = i, ..., i + B - 1
            if group and place % group[1] == 0:
                # M for N:M sparsity: B_s = M, and N of every M neighbours are removed ("semi-structured sparsity").
                near = slice(place, place + group[1])
                wanted = torch.addmm(heard[start:stop][near], inner[near, :place], errors[:place])
                wanted = _if_kept(exact[start:stop][near], wanted, inner[near, near])
                gone[near] = lowest_in_groups((wanted.square() * costs[near]).t().contiguous(), group).t()
            # W_:,j after the updates by the errors of this block so far, then W <- W * M
            wanted = torch.addmv(heard[start + place], errors[:place].t(), inner[place, :place])
            heard[start + place] = wanted.masked_fill(gone[place], 0)
            # E_:,j-i: the total error W - V
            torch.sub(exact[start + place], heard[start + place], out=errors[place])
        # W_:,(i+B): is updated by the errors of the whole block
        heard[stop:].addmm_(upper[start:stop, stop:].t(), errors)
    return heard


def _if_kept(exact: torch.Tensor, heard: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return what some channels' weights become, [channels, out], if all of them are kept: the paper's W at that point.

    Each channel then also receives the feedback of those before it among them: V_k = W_k + C_k - sum_{j<k} (V_j - W_j) U_jk, with
    `C = heard - exact`.
    """
    import torch

    change: torch.Tensor = torch.linalg.solve_triangular(inner, heard - exact, upper=False, unitriangular=True)
    return exact + change
