"""Linear feedback: what a change of one input channel of a layer asks of those after it, from the second moment of the inputs.

What GPTQ and SparseGPT rest on, written as in Chee et al. 2023 (QuIP, arXiv 2307.13304, section 3.2 and theorem 6): one Cholesky
factor, no inverse. With the moment `H = (U + I) D (U + I)^T` errors E = W - V of a new weight V cost
`tr(E H E^T) = sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.methods.base import Method
from compress.models.files.headers import TensorInfo

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


@dataclass(frozen=True)
class Feedback:
    """The damped second moment as `(U + I) D (U + I)^T`, channels in the order in which they are rounded."""

    order: torch.Tensor
    """int64 [in]: which channel comes when."""
    upper: torch.Tensor
    """float32 [in, in], strictly upper: what a channel hears of the errors of those before it."""
    diagonal: torch.Tensor
    """float32 [in]: what the squared error of a channel costs once it has heard them."""
    damping: float
    """What was added to the moment's diagonal."""


class FeedbackMethod(Method):
    """A method that works on linear layers one input channel after another, with linear feedback."""

    damping: float = Field(0.01, gt=0, le=1)
    """Added to the diagonal of the second moment, as a share of its mean."""
    weighting: Literal["tokens", "pooled"] = "tokens"
    """What counts in the second moment: every token alike, or pooled tokens alone, each as much as it counts in its text's mean."""

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    def work_bytes(self, linears: list[TensorInfo]) -> int:
        """Second moments of a block's inputs, and the factor of the largest."""
        return moment_bytes([info.shape[1] for info in linears])

    def feedbacks(
        self, parts: Parts, linears: Mapping[str, nn.Linear], inputs: Inputs | None, act_order: bool
    ) -> Iterator[tuple[tuple[str, ...], torch.Tensor, Feedback]]:
        """Yield the names of layers that share an input, its second moment, float32 [in, in], and that factored.

        Raises:
            ValueError: a moment has no Cholesky factor even in float64; names the layers.
        """
        from compress.calibration.statistics import Hessian

        assert inputs is not None, "the segment has linear layers, and the step said that it calibrates"
        groups, moments = inputs.gather(parts, linears, Hessian, pooled_only=self.weighting == "pooled")
        for leader, names in groups.items():
            moment = moments.pop(leader).mean()
            try:
                yield names, moment, factor(moment, self.damping, act_order)
            except ValueError as error:
                raise ValueError(f"{', '.join(names)}: {error}") from error


def moment_bytes(widths: Sequence[int]) -> int:
    """Return the memory of the second moments of inputs of these widths, and of the factor of the largest."""
    return 4 * (sum(width**2 for width in set(widths)) + 2 * max(widths, default=0) ** 2)


def factor(moment: torch.Tensor, damping: float, act_order: bool) -> Feedback:
    """Factor a second moment, float32 [in, in].

    Raises:
        ValueError: it has no Cholesky factor.
    """
    import torch

    spread = moment.diagonal()
    added = damping * float(spread.mean()) or 1.0  # all inputs zero: any rounding is right, and the identity gives the plain one
    order = spread.argsort(descending=True, stable=True) if act_order else torch.arange(len(spread), device=moment.device)
    # Cholesky of the matrix turned by 180 degrees, turned back, is the factor that is upper and not lower.
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
    pivots = upper.diagonal().clone()
    upper = upper.div_(pivots).triu_(1)
    return Feedback(order, upper, pivots.square_(), added)


def loss_of(errors: torch.Tensor, feedback: Feedback) -> torch.Tensor:
    """Return what errors [out, in] cost each output channel, damping left out: float32 [out]."""
    from compress.layers.float_layers import linear

    ordered = errors[:, feedback.order]
    heard = linear(ordered, feedback.upper.t()).add_(ordered)
    return heard.square_() @ feedback.diagonal - feedback.damping * ordered.square_().sum(dim=1)
