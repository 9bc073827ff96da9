"""SparseGPT: weights go one input channel after another, and those that are left make up for what is gone."""

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

# Input channels among which the weights that go are chosen together (the paper's B_s), and output channels worked on at once.
BLOCK, ROWS = 128, 4_096


class SparseGPT(FeedbackMethod, PruneWeights):
    """Prune linear layers so that their outputs on calibration texts change least.

    Frantar and Alistarh 2023, arXiv 2301.00774, algorithm 1, written as linear feedback as our GPTQ is: a channel hears the errors
    of those before it, a weight that stays takes all that it hears, one that goes leaves an error of its own. Which go is chosen
    block by block of channels, or group by group of a pattern, from the weights as they are then: those whose loss costs least.
    """

    method: Literal["sparsegpt"] = "sparsegpt"

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Cholesky factors and feedback; layers that share an input are counted as if they did not."""
        return sum(info.shape[1] ** 3 / 3 + info.shape[0] * info.shape[1] ** 2 for info in linears)

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`.

        Raises:
            ValueError: a layer's second moment has no Cholesky factor even in float64.
        """
        # In their own order: a pattern's neighbours are in one block then.
        for names, _, feedback in self.feedbacks(parts, linears, inputs, act_order=False):
            for name in names:
                weight = linears[name].weight
                weight.data = prune_with_feedback(weight.detach().float(), feedback, self.sparsity, self.group).to(weight.dtype)


def prune_with_feedback(weight: torch.Tensor, feedback: Feedback, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    """Prune a weight, float32 [out, in], and return it with the survivors changed.

    With errors E = W - V of the new weight V the output's squared error is sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2 (see
    `feedback.factor`). A survivor V_k = W_k + sum_{j<k} E_j U_jk costs nothing, a weight that goes D_k times the square of that.
    """
    import torch

    made = torch.empty_like(weight)
    upper = feedback.upper
    for first in range(0, len(weight), ROWS):
        exact = weight[first : first + ROWS].t().contiguous()  # transposed: a channel is a row, and lies in one piece
        heard = exact.clone()
        for start in range(0, len(exact), BLOCK):
            stop = min(start + BLOCK, len(exact))
            costs = feedback.diagonal[start:stop, None]
            errors = torch.zeros(stop - start, exact.shape[1], device=weight.device)
            inner = upper[start:stop, start:stop].t().contiguous()
            gone = torch.zeros(errors.shape, dtype=torch.bool, device=weight.device)
            if group is None:
                gone = lowest(_if_kept(exact[start:stop], heard[start:stop], inner).square() * costs, sparsity)
            for place in range(stop - start):
                if group and place % group[1] == 0:  # neighbours are chosen among by what they have heard by then
                    near = slice(place, place + group[1])
                    wanted = torch.addmm(heard[start:stop][near], inner[near, :place], errors[:place])
                    wanted = _if_kept(exact[start:stop][near], wanted, inner[near, near])
                    gone[near] = lowest_in_groups((wanted.square() * costs[near]).t().contiguous(), group).t()
                wanted = torch.addmv(heard[start + place], errors[:place].t(), inner[place, :place])
                heard[start + place] = wanted.masked_fill(gone[place], 0)
                torch.sub(exact[start + place], heard[start + place], out=errors[place])
            heard[stop:].addmm_(upper[start:stop, stop:].t(), errors)
        made[first : first + ROWS] = heard.t()
    return made


def _if_kept(exact: torch.Tensor, heard: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Return what some channels' weights become, [channels, out], if all of them are kept.

    Each then hears of those before it among them too: V_k = W_k + C_k - sum_{j<k} (V_j - W_j) U_jk, `C = heard - exact`.
    """
    import torch

    change: torch.Tensor = torch.linalg.solve_triangular(inner, heard - exact, upper=False, unitriangular=True)
    return exact + change
