"""GPTQ: weights are rounded one input channel after another, and each rounds off what those before it have lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from compress.layers.scheme import QuantizedLayer
from compress.methods.error_feedback import FeedbackMethod, loss_of
from compress.methods.linear_layers import zeros_of
from compress.methods.quantize.base import Bits, IntegerWeights
from compress.models.files.headers import TensorInfo
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    import torch

    from compress.calibration.inputs import Inputs
    from compress.layers.grid import Grid
    from compress.methods.error_feedback import Feedback
    from compress.models.network.segments import Parts

# Input channels whose errors are fed forward together, and output channels that are worked on at once (none depends on another).
BLOCK, ROWS = 128, 4_096


class GPTQ(FeedbackMethod, IntegerWeights):
    """Round linear layers so that their outputs on calibration texts change least.

    Frantar et al. 2023, arXiv 2210.17323. Written as linear feedback (Chee et al. 2023, QuIP, arXiv 2307.13304, section 3.2 and
    theorem 6, which shows that both are the same): it needs one Cholesky factor of the inputs' second moment and no inverse. Scales
    are found before anything is rounded ("static groups"), so that channels can be taken in any order. An output channel
    that plain rounding serves better on the calibration texts is rounded plainly.
    """

    method: Literal["gptq"] = "gptq"
    bits: Bits = 4
    """Bits of a weight."""
    group_size: int | None = Field(64, ge=8)
    """Inputs that share a scale; null: an output channel has one."""
    act_order: bool = True
    """Whether input channels are taken in falling order of their mean square, those that matter most first."""
    search: bool = True
    """Whether each scale is the one with the least squared error, inputs weighed by their mean square."""

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Cholesky factors and feedback; layers that share an input are counted as if they did not."""
        return sum(info.shape[1] ** 3 / 3 + 3 * info.shape[0] * info.shape[1] ** 2 for info in linears)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `QuantizedLinear`.

        Raises:
            ValueError: a weight is NaN or infinite, or a layer's second moment has no Cholesky factor even in float64.
        """
        from compress.layers.grid import find_grid
        from compress.layers.quantized_linear import QuantizedLinear

        linears = self.linears_in(parts)
        if not linears:
            return {}
        quantized = {}
        for names, moment, feedback in self.feedbacks(parts, linears, inputs, self.act_order):
            for name in names:
                weight, wanted = linears[name].weight.detach().float(), self.numbers_of(name)
                grid = find_grid(
                    weight, wanted.bits, wanted.group_size, wanted.symmetric, search=self.search, importance=moment.diagonal()
                )
                integers = round_with_feedback(weight, grid, feedback, zeros_of(weight))
                layer = QuantizedLinear.from_integers(integers, grid, linears[name].bias)
                replace_module(parts, name, layer)
                quantized[name] = layer.layer
        return quantized


def round_with_feedback(weight: torch.Tensor, grid: Grid, feedback: Feedback, gone: torch.Tensor | None = None) -> torch.Tensor:
    """Round a weight, float32 [out, in], to unsigned integers of a grid, uint8 [out, in].

    With errors E = W - Q the output's squared error is tr(E H E^T) = sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2, so channel k is
    rounded after `sum_{j<k} E_j U_jk` is added to it, and nothing later undoes that. Weights that are `gone`, bool [out, in], stay
    zero whatever they hear, and what they would have made up for is left to those after them.
    """
    import torch

    rounded = grid.round(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        plain = rounded[rows]
        fed, loss = _round_rows(weight[rows], rows, grid, feedback, None if gone is None else gone[rows])
        better = loss < loss_of(weight[rows] - _values(plain, rows, grid), feedback)
        rounded[rows] = torch.where(better[:, None], fed, plain)
    return rounded


def _round_rows(
    weight: torch.Tensor, rows: slice, grid: Grid, feedback: Feedback, gone: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round some rows; also return what that costs each of them, damping left out."""
    import torch

    order, upper = feedback.order, feedback.upper
    group = grid.group_of(weight.shape[1], weight.device)[order].tolist()
    costs = feedback.diagonal.tolist()
    # Transposed: a channel is then a row, and lies in one piece.
    scales, zeros = grid.scale[rows].t().contiguous(), grid.zero[rows].t().contiguous()
    exact = weight.t()[order].contiguous()
    stay_zero = None if gone is None else gone.t()[order].contiguous()
    heard = exact.clone()
    integers = torch.empty(exact.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(exact.shape[1], device=weight.device)
    for start in range(0, len(exact), BLOCK):
        stop = min(start + BLOCK, len(exact))
        errors = torch.empty(stop - start, exact.shape[1], device=weight.device)
        inner = upper[start:stop, start:stop].t().contiguous()
        for channel in range(start, stop):
            place = channel - start
            wanted = torch.addmv(heard[channel], errors[:place].t(), inner[place, :place]) if place else heard[channel]
            scale, zero = scales[group[channel]], zeros[group[channel]]
            steps = (wanted / scale).round_().add_(zero).clamp_(grid.lowest, grid.highest)
            if stay_zero is not None:
                steps = torch.where(stay_zero[channel], zero, steps)
            integers[channel] = steps.to(torch.uint8)
            value = steps.sub_(zero).mul_(scale)
            torch.sub(exact[channel], value, out=errors[place])
            loss.addcmul_(value.sub_(wanted), value, value=costs[channel])
            loss.addcmul_(errors[place], errors[place], value=-feedback.damping)
        heard[stop:].addmm_(upper[start:stop, stop:].t(), errors)
    result = torch.empty_like(integers)
    result[order] = integers
    return result.t(), loss


def _values(integers: torch.Tensor, rows: slice, grid: Grid) -> torch.Tensor:
    from compress.layers.grid import dequantize

    return dequantize(integers, grid.scale[rows], grid.zero[rows], grid.group_size, grid.scale.dtype)
