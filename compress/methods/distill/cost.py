"""What a training takes, from shapes alone: memory of each device, operations of each. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from compress.models.shape import HALF_BYTES, ModelShape

# Weights, gradients and AdamW's two moments in float32; without a gradient, the weight alone.
TRAINED_BYTES, FROZEN_BYTES = 16, 4
# Kept of each token and block for the way back, in units of the width: Korthikanti et al. 2022 (arXiv 2205.05198), half precision,
# attention in tiles.
KEPT_BYTES = 34
GPU_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Training:
    """The sizes that a training's cost follows from."""

    student: ModelShape
    trained: int
    """Parameters that are."""
    batch: int
    """Texts a step, without accumulation."""
    batches: int
    length: int
    """Tokens of a text."""
    sharded: bool
    follows: ModelShape | None
    """The teacher, where it runs beside the student for its hidden states."""

    @property
    def operations(self) -> float:
        """Floating-point operations of all devices together: forward, and twice that back."""
        tokens = self.batches * self.batch * self.length
        beside = self.follows.flops_per_token(self.length) if self.follows else 0.0
        return tokens * (3 * self.student.flops_per_token(self.length) + beside)

    def memory_bytes(self, devices: int) -> int:
        """Return the bytes on each of so many devices, the texts and the teacher's vectors aside."""
        shape = self.student
        # What is in integers learns, or is passed through, as the floating-point values that it stands for.
        frozen = shape.parameters + shape.packed_parameters - self.trained
        state = TRAINED_BYTES * self.trained + FROZEN_BYTES * frozen
        if self.sharded and devices > 1:
            # A block's weights and gradients are whole while it runs.
            state = state // devices + 2 * FROZEN_BYTES * shape.largest_segment_bytes // HALF_BYTES
        tokens = -(-self.batch // devices) * self.length
        beside = FROZEN_BYTES * self.follows.parameters if self.follows else 0
        return state + tokens * shape.blocks * KEPT_BYTES * shape.hidden_size + shape.activation_bytes(tokens) + beside


def low_rank_parameters(shape: ModelShape, rank: int) -> int:
    """Return how many parameters low-rank changes of the blocks' linear layers have."""
    return sum(rank * sum(info.shape) for info in shape.block_linears.values())
