"""AutoRound: whether each weight is rounded up or down is learned, block by block, by signed gradient descent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.calibration.texts import BATCH_TOKENS
from compress.methods.base import Estimate
from compress.methods.linear_layers import zeros_of
from compress.methods.quantize.base import Bits, IntegerWeights
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.methods.quantize.offsets import Offsets
    from compress.models.network.segments import Parts

# Tokens of a typical text, for the estimate.
TYPICAL_LENGTH = 64
# A step takes a forward pass, and a backward pass of twice its operations, of one calibration batch.
FORWARD_AND_BACKWARD = 3
# Numbers in float32 for each weight of a block: weight, offset, gradient, best offset, and four that wait for the backward pass.
COPIES = 8


class AutoRound(IntegerWeights):
    """Round linear layers so that the outputs of their blocks change least, by learning each weight's rounding.

    Cheng et al. 2023, arXiv 2309.05516 (SignRound, AutoRound). Block by block, an offset between -0.5 and 0.5 is added to each
    weight before it is rounded, and each group's range may shrink. Both are learned by the signs of their gradients. The loss is
    the mean squared difference between the block's output, for inputs as the blocks rounded before it make them, and the output
    that the block has in the unchanged model; padding does not count. A step takes one calibration batch, some 2,000 tokens of
    texts of similar lengths. What had the lowest loss, relative to plain rounding's on the same batch, is kept.
    """

    method: Literal["autoround"] = "autoround"
    bits: Bits = 4
    """Bits per weight."""
    group_size: int | None = Field(64, ge=8)
    """Number of inputs that share a scale; null: one scale per output channel."""
    steps: int = Field(200, ge=1, le=100_000)
    """Number of steps for each block."""
    learning_rate: float | None = Field(None, gt=0, le=1)
    """How far a step moves at first; the rate falls to zero linearly. By default 1 / `steps`, with which an offset can just move
    from one end of its range to the middle, or from there to an end."""
    search: bool = False
    """Whether ranges start where the squared error of the weights is least; otherwise they start from the range of the weights."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the order of the batches."""

    @model_validator(mode="after")
    def _blocks_only(self) -> Self:
        if self.head:
            raise ValueError("autoround learns from the outputs of blocks; leave `head` out, and round the head with gptq")
        return self

    @property
    def calibrates(self) -> bool:
        """Always: the roundings are learned from texts."""
        return True

    @property
    def compares(self) -> bool:
        """Always: the unchanged model's outputs are what is learned."""
        return True

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size as for all integer weights; in addition the time of the steps, and the outputs that are kept.

        Raises:
            ValueError: see `QuantizeLinears.estimate`.
        """
        made = super().estimate(shape)
        linears, names = self.linears_of(shape)
        weights = sum(linears[name].parameters for name in names)
        return replace(
            made,
            memory_bytes=max(made.memory_bytes, 4 * COPIES * weights // max(1, shape.blocks)),
            # To see the unchanged model's outputs, and to take its inputs to the next block.
            passes=2.0,
            copies=1.0,
            flops=made.flops + FORWARD_AND_BACKWARD * self.steps * BATCH_TOKENS * shape.flops_per_token(TYPICAL_LENGTH),
        )

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`.

        Raises:
            ValueError: an earlier step has quantized other layers of the block, through which no gradients pass.
        """
        from torch.nn.utils import parametrize

        from compress.layers.quantized_linear import QuantizedLinear
        from compress.methods.quantize.offsets import Offsets

        assert inputs is not None, "autoround calibrates"
        _check_plain(parts)
        offsets: dict[str, Offsets] = {}
        for name, linear in linears.items():
            weight = linear.weight.detach().float()
            offsets[name] = Offsets(weight, self.grid_of(name, weight, search=self.search), zeros_of(weight))
            parametrize.register_parametrization(linear, "weight", offsets[name])
        try:
            _learn(parts, list(offsets.values()), inputs, self)
        finally:
            for linear in linears.values():
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        for name, linear in linears.items():
            yield name, QuantizedLinear.from_integers(*offsets.pop(name).integers(), linear.bias)


def _check_plain(parts: Parts) -> None:
    """See that gradients pass every layer of a block.

    Raises:
        ValueError: an earlier step has quantized one.
    """
    from compress.layers.compressed import CompressedLayer

    for path, part in parts.items():
        for name, module in part.named_modules():
            if isinstance(module, CompressedLayer):
                raise ValueError(f"{path}.{name} is quantized already, and passes no gradients; put autoround before that step")


def _learn(parts: Parts, offsets: list[Offsets], inputs: Inputs, settings: AutoRound) -> None:
    """Learn the offsets and ranges of a block's layers (algorithm 1 of the paper).

    Args:
        parts: the block; its layers round with the offsets.
        offsets: the offsets of its layers; they are left at the best.
        inputs: the calibration texts.
        settings: steps, rate and seed.
    """
    import torch

    assert inputs.original is not None, "autoround compares"
    with torch.no_grad():
        exact = [inputs.original.tokens(batch).float() for batch in range(inputs.batches)]

    def loss_on(batch: int) -> torch.Tensor:
        return (inputs.tokens(parts, batch).float() - exact[batch]).square().mean()

    with torch.no_grad():
        plain = [float(loss_on(batch)) or 1.0 for batch in range(inputs.batches)]
    learned = [parameter for offset in offsets for parameter in offset.parameters()]
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    best, least = [offset.state() for offset in offsets], 1.0
    rate = settings.learning_rate or 1 / settings.steps
    for step in range(settings.steps):
        order = order or torch.randperm(inputs.batches, generator=generator).tolist()
        batch = order.pop()
        with torch.enable_grad():
            # Batches differ: what one costs says something only next to what plain rounding costs on it.
            loss = loss_on(batch) / plain[batch]
            if not torch.isfinite(loss):
                raise ValueError("the block's output on the calibration texts holds NaN or infinity")
            loss.backward(inputs=learned)  # type: ignore[no-untyped-call]
        if float(loss) < least:
            best, least = [offset.state() for offset in offsets], float(loss)
        for offset in offsets:
            offset.step(rate * (1 - step / settings.steps))  # V <- V - lr sign(dL/dV), with a linear decay
    for offset, state in zip(offsets, best, strict=True):
        offset.restore(state)
