"""Error feedback: how the error of one input channel changes what the channels after it should be, given the inputs' second moment.

GPTQ and SparseGPT rest on it. Both are written here as linear feedback with one Cholesky factor and no inverse, as in Chee et al.
2023 (QuIP, arXiv 2307.13304, section 3.2 and theorem 6). With the second moment `H = (U + I) D (U + I)^T`, U strictly upper
triangular and D diagonal, the errors E = W - V of a new weight V cost `tr(E H E^T) = sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.methods.linear_layers import LinearsMethod
from compress.models.files.headers import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


@dataclass(frozen=True)
class Feedback:
    """The damped second moment as `(U + I) D (U + I)^T`, with channels in the order in which they are rounded."""

    order: torch.Tensor
    """Channels in the order in which they are worked on, int64 [in]."""
    upper: torch.Tensor
    """U, strictly upper triangular, float32 [in, in]: how much of each earlier channel's error a channel takes on."""
    diagonal: torch.Tensor
    """D, float32 [in]: the cost of a channel's squared error after feedback."""
    damping: float
    """The value that was added to the moment's diagonal."""


class FeedbackMethod(LinearsMethod):
    """A method that works on linear layers one input channel after another, with error feedback."""

    damping: float = Field(0.01, gt=0, le=1)
    """Value added to the diagonal of the second moment, as a share of the diagonal's mean."""
    weighting: Literal["tokens", "pooled"] = "tokens"
    """Weight of each token in the second moment: all tokens count the same (`tokens`), or only pooled tokens count, each as much as
    in its text's mean (`pooled`)."""

    @property
    def calibrates(self) -> bool:
        """Always: the inputs' second moment decides."""
        return True

    def work_bytes(self, linears: list[TensorInfo]) -> int:
        """Return the bytes of the second moments of a block's inputs, and of the largest one's factor."""
        return moment_bytes([info.shape[1] for info in linears])

    def feedbacks(
        self, parts: Parts, linears: Mapping[str, nn.Linear], inputs: Inputs | None, act_order: bool
    ) -> Iterator[tuple[tuple[str, ...], torch.Tensor, Feedback]]:
        """Yield the names of layers that share an input, the input's second moment, float32 [in, in], and its factors.

        Raises:
            ValueError: a moment has no Cholesky factor even in float64; the message names the layers.
        """
        from compress.calibration.statistics import Hessian

        pooled_only = self.weighting == "pooled"
        for names, hessian in self.statistics_of(parts, linears, inputs, Hessian, pooled_only=pooled_only):
            moment = hessian.mean()
            yield names, moment, self.factored(names, moment, act_order)

    def factored(self, names: Sequence[str], moment: torch.Tensor, act_order: bool) -> Feedback:
        """Return the factors of the second moment of some layers' common input.

        Raises:
            ValueError: it has no Cholesky factor even in float64; the message names the layers.
        """
        try:
            return factor(moment, self.damping, act_order)
        except ValueError as error:
            raise ValueError(f"{', '.join(names)}: {error}") from error


def moment_bytes(widths: Sequence[int]) -> int:
    """Return the bytes of the second moments of inputs of these widths, and of the largest one's factor."""
    return 4 * (sum(width**2 for width in set(widths)) + 2 * max(widths, default=0) ** 2)


def factor(moment: torch.Tensor, damping: float, act_order: bool) -> Feedback:
    """Factor a second moment, float32 [in, in].

    Args:
        moment: the second moment H.
        damping: share of the mean diagonal that is added to the diagonal (1 % in GPTQ).
        act_order: whether channels are taken in descending order of their mean square, as in the code of GPTQ's authors.

    Raises:
        ValueError: it has no Cholesky factor.
    """
    import torch

    spread = moment.diagonal()
    added = damping * float(spread.mean()) or 1.0  # all inputs zero: any rounding is right, and the identity gives the plain one
    order = spread.argsort(descending=True, stable=True) if act_order else torch.arange(len(spread), device=moment.device)
    # Cholesky gives lower factors. The factor of the matrix rotated by 180 degrees, rotated back, is the upper one that is needed.
    turned = moment.index_select(0, order.flip(0)).index_select(1, order.flip(0))
    turned.diagonal().add_(added)
    for dtype in (torch.float32, torch.float64):
        lower, failed = torch.linalg.cholesky_ex(turned.to(dtype))
        if not failed:
            break
    else:
        raise ValueError(f"the second moment of its inputs is not positive definite with a damping of {damping}; raise `damping`")
    del turned  # 0.8 GB each for the widest layer of a 7B
    upper = lower.flip(0, 1).float()
    del lower
    # Cholesky's factor is (U + I) D^(1/2): divide its columns by their pivots to get U, and square the pivots to get D.
    pivots = upper.diagonal().clone()
    upper = upper.div_(pivots).triu_(1)
    return Feedback(order, upper, pivots.square_(), added)


def drift_correction(drift: torch.Tensor, feedback: Feedback) -> torch.Tensor:
    """Return C, float32 [in, in], with which W + W C is the target of a layer W whose inputs have drifted.

    The unchanged model's outputs are W z, the layer gets x. The least squares of |W z - V x|^2 give V = W + W S H^-1, with the
    drift S = E[(z - x) x^T] and H = E[x x^T]; the damping in H pulls V to W. Since |W z - V x|^2 grows from there with the second
    moment of x alone, rounding V with feedback solves column by column for what makes it least (GPTAQ: Li et al. 2025, arXiv
    2504.02692, section 3; there a channel's drift is taken on by the channels after it, here by all).

    Args:
        drift: S, float32 [in, in]; see `compress.calibration.statistics.Drift`.
        feedback: H's factors.
    """
    import torch

    upper, order = feedback.upper, feedback.order
    # C H = S with H = (U + I) D (U + I)^T
    made = drift.index_select(0, order).index_select(1, order)
    made = torch.linalg.solve_triangular(upper.t(), made, upper=False, left=False, unitriangular=True)
    made = torch.linalg.solve_triangular(upper, made.div_(feedback.diagonal), upper=True, left=False, unitriangular=True)
    correction = torch.empty_like(made)
    correction[order[:, None], order] = made
    return correction


def loss_of(errors: torch.Tensor, feedback: Feedback, moved: torch.Tensor | None = None) -> torch.Tensor:
    """Return the cost of errors [out, in] for each output channel, without the damping's share: float32 [out].

    Args:
        errors: target minus new weight.
        feedback: the second moment's factors.
        moved: old weight minus new weight, [out, in], where the target is another one; damping pulls to the old weight.
    """
    from compress.layers.float_layers import linear

    # sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2, less damping * sum_k E_k^2
    ordered = errors[:, feedback.order]
    heard = linear(ordered, feedback.upper.t()).add_(ordered)
    far = ordered if moved is None else moved[:, feedback.order]
    return heard.square_() @ feedback.diagonal - feedback.damping * far.square().sum(dim=1)
