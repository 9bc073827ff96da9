"""GPTQ: weights are rounded one input channel after another, and each makes up for the rounding errors before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.methods.base import Estimate
from compress.methods.error_feedback import FeedbackMethod, loss_of
from compress.methods.linear_layers import zeros_of
from compress.methods.quantize.base import Bits, check_groups
from compress.methods.quantize.formats import FormattedWeights, check_float4_activations, stored_layer
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.layers.float4 import AnyGrid
    from compress.methods.error_feedback import Feedback
    from compress.models.network.segments import Parts

# Number of input channels whose errors are fed forward together (B of algorithm 1), and of output channels that are worked on at
# once # (none depends on another).
BLOCK, ROWS = 128, 4_096


class GPTQ(FeedbackMethod, FormattedWeights):
    """Round linear layers so that their outputs on calibration texts change least.

    Frantar et al. 2022, arXiv 2210.17323. It is written as linear feedback (QuIP, Chee et al. 2023, arXiv 2307.13304, section 3.2;
    theorem 6 shows that both are the same), which needs one Cholesky factor of the inputs' second moment and no inverse. Scales are
    found before anything is rounded ("static groups"), so that channels can be taken in any order. An output channel for which
    plain rounding is better on the calibration texts is rounded to nearest.

    With `drift` the target is what a layer gives in the unchanged model, where its inputs have not drifted: |W Z - V X|^2 is made
    small, with the unchanged model's inputs Z (GPTAQ: Li et al. 2025, arXiv 2504.02692).
    """

    method: Literal["gptq"] = "gptq"
    bits: Bits = 4
    """Bits per weight."""
    group_size: int | None = Field(64, ge=8)
    """Number of inputs that share a scale; null: one scale per output channel."""
    act_order: bool = True
    """Whether input channels are rounded in descending order of their mean square, so that the most important come first."""
    search: bool = True
    """Whether each scale minimises the squared error with inputs weighted by their mean square; otherwise it clips nothing."""
    activations: Literal["none", "dynamic_per_group"] = "none"
    """How the layer's input is quantized: not at all, or to int8 with one scale per token and group of inputs (the groups of the
    weight), which lets a runtime multiply integers."""

    @model_validator(mode="after")
    def _scaled_activations_have_groups(self) -> Self:
        check_float4_activations(Numbers(self.format), ActivationScheme(self.activations))
        if self.activations == "dynamic_per_group":
            check_groups(self)
        return self

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the layer's format and precision, with the step's activations.

        Raises:
            ValueError: the layer's format does not go with quantized activations; see also `FormattedWeights.numbers_of`.
        """
        layer = super().numbers_of(name)
        check_float4_activations(layer.numbers, ActivationScheme(self.activations), f"{name}: ")
        return layer.model_copy(update={"activations": ActivationScheme(self.activations)})

    drift: float = Field(0.0, ge=0, le=1)
    """How much of the drift of its inputs a layer makes up for: 0 is GPTQ, with 1 its outputs are fitted to those that it has in
    the unchanged model (GPTAQ). Its inputs are then those that the layers rounded before it in the same block make, too."""

    @model_validator(mode="after")
    def _drift_is_seen_in_blocks(self) -> Self:
        if self.drift and self.head:
            raise ValueError("`drift` is known inside the blocks only; leave `head` out, or `drift`")
        return self

    @property
    def compares(self) -> bool:
        """Whether drift is made up for."""
        return self.drift > 0

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size; with `drift`, also the time and memory of the unchanged model next to the changed one.

        Raises:
            ValueError: see `QuantizeLinears.estimate`.
        """
        made = super().estimate(shape)
        if not self.drift:
            return made
        # Both models run up to each of a block's inputs, of which most blocks have four; the unchanged one also to the next block.
        return replace(made, memory_bytes=made.memory_bytes + shape.largest_segment_bytes, passes=6.0)

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Return the operations of Cholesky factors and feedback; layers that share an input are counted as if they did not."""
        return sum(info.shape[1] ** 3 / 3 + 3 * info.shape[0] * info.shape[1] ** 2 for info in linears)

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`.

        Raises:
            ValueError: a layer's second moment has no Cholesky factor even in float64.
        """
        import torch

        for names, moment, feedback, correction in self._statistics(parts, linears, inputs):
            for name in names:
                weight = linears[name].weight.detach().float()
                target = weight if correction is None else torch.addmm(weight, weight, correction, alpha=self.drift)
                grid = self.any_grid_of(name, target, search=self.search, importance=moment.diagonal())
                integers = round_with_feedback(weight, grid, feedback, zeros_of(weight), target)
                yield name, stored_layer(integers, grid, linears[name].bias, ActivationScheme(self.activations))

    def _statistics(
        self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None
    ) -> Iterator[tuple[tuple[str, ...], torch.Tensor, Feedback, torch.Tensor | None]]:
        """Yield what `feedbacks` yields, and the correction of the weights for their inputs' drift, None where that is ignored."""
        from compress.calibration.statistics import Drift
        from compress.methods.error_feedback import drift_correction

        if not self.drift:
            for names, moment, feedback in self.feedbacks(parts, linears, inputs, self.act_order):
                yield names, moment, feedback, None
            return
        assert inputs is not None, "gptq calibrates"
        # Input after input: what a layer makes up for is not drift any more for those after it.
        for names in inputs.groups(parts, linears):
            _, found = inputs.gather_both(parts, {names[0]: linears[names[0]]}, Drift, pooled_only=self.weighting == "pooled")
            statistic = found[names[0]]
            moment = statistic.moment()
            feedback = self.factored(names, moment, self.act_order)
            yield names, moment, feedback, drift_correction(statistic.drift(), feedback)


def round_with_feedback(
    weight: torch.Tensor,
    grid: AnyGrid,
    feedback: Feedback,
    gone: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
) -> torch.Tensor:
    """Round a weight, float32 [out, in], to a grid: return its unsigned integers, or E2M1's bits, uint8 [out, in].

    With errors E = W - Q the output's squared error is tr(E H E^T) = sum_k D_k |E_k + sum_{j<k} E_j U_jk|^2. So channel k is
    rounded after `sum_{j<k} E_j U_jk` has been added to it, which makes its term as small as rounding allows. Weights that are
    `gone`, bool [out, in], stay zero; the channels after them make up for that. Where a `target`, float32 [out, in], is given, it
    takes the weight's place in E.
    """
    import torch

    target = weight if target is None else target
    rounded = grid.round(weight)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        plain = rounded[rows]
        fed, loss = _round_rows((weight[rows], target[rows]), rows, grid, feedback, None if gone is None else gone[rows])
        # Per output channel, the better of feedback and plain rounding.
        value = grid.rows(rows).values(plain)
        better = loss < loss_of(target[rows] - value, feedback, weight[rows] - value)
        rounded[rows] = torch.where(better[:, None], fed, plain)
    return rounded


def _round_rows(
    weights: tuple[torch.Tensor, torch.Tensor], rows: slice, grid: AnyGrid, feedback: Feedback, gone: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round some rows by GPTQ's algorithm 1, given weight and target; also return each row's cost without the damping's share.

    In the paper the weights themselves are updated: W_:,k becomes W_:,k - E_:,j [H^-1]_jk. Here the same values are the sum of the
    exact weight and the feedback of all errors before it, `heard`.
    """
    import torch

    weight, target = weights
    order, upper = feedback.order, feedback.upper
    group = grid.group_of(weight.shape[1], weight.device)[order].tolist()
    costs = feedback.diagonal.tolist()
    # Transposed: a channel is then a row, contiguous in memory.
    scales, zeros = grid.scale[rows].t().contiguous(), grid.zero[rows].t().contiguous()
    exact, near = (x.t()[order].contiguous() for x in (target, weight))
    stay_zero = None if gone is None else gone.t()[order].contiguous()
    heard = exact.clone()
    integers = torch.empty(exact.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros(exact.shape[1], device=weight.device)
    for start in range(0, len(exact), BLOCK):  # for i = 0, B, 2B, ...
        stop = min(start + BLOCK, len(exact))
        errors = torch.empty(stop - start, exact.shape[1], device=weight.device)
        inner = upper[start:stop, start:stop].t().contiguous()
        for channel in range(start, stop):  # for j = i, ..., i + B - 1
            place = channel - start
            # W_:,j after the updates by the errors of this block so far
            wanted = torch.addmv(heard[channel], errors[:place].t(), inner[place, :place]) if place else heard[channel]
            # Q_:,j = quant(W_:,j)
            scale, zero = scales[group[channel]], zeros[group[channel]]
            steps = grid.steps(wanted, scale, zero)
            if stay_zero is not None:
                steps = steps.masked_fill_(stay_zero[channel], 0)
            integers[channel] = grid.codes(steps, zero)
            value = steps.mul_(scale)
            # E_:,j-i: the total error W - Q here, where the paper has the rounding error over [H^-1]_jj
            torch.sub(exact[channel], value, out=errors[place])
            moved = near[channel] - value
            loss.addcmul_(value.sub_(wanted), value, value=costs[channel])
            loss.addcmul_(moved, moved, value=-feedback.damping)
        # W_:,(i+B): is updated by the errors of the whole block (step 2 of the paper, "lazy batch-updates")
        heard[stop:].addmm_(upper[start:stop, stop:].t(), errors)
    result = torch.empty_like(integers)
    result[order] = integers
    return result.t(), loss
