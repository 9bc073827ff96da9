"""The cost of a training, from shapes alone: memory and operations of each device. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from compress.models.architectures import HEAD_PREFIX
from compress.models.shape import HALF_BYTES, ModelShape

# Weights, gradients and AdamW's two moments in float32; only the weight if there is no gradient.
TRAINED_BYTES, FROZEN_BYTES = 16, 4
# Bytes kept for the backward pass, per token, block and hidden channel: 34 s b h of Korthikanti et al. 2022 (arXiv 2205.05198,
# section 4.1), in half precision; the quadratic term is absent because attention is computed in tiles.
KEPT_BYTES = 34
# Bytes kept per token and hidden channel of each further exit: the norm's output in half precision and in float32 for the pooling.
EXIT_BYTES = 6
GPU_COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Training:
    """The sizes that determine a training's cost."""

    student: ModelShape
    trained: int
    """Number of trained parameters."""
    batch: int
    """Texts per batch."""
    batches: int
    """Number of batches, over all steps."""
    length: int
    """Tokens per text."""
    sharded: bool
    follows: ModelShape | None
    """The teacher, if it runs next to the student for its hidden states; None: it does not."""
    exits: int = 0
    """Number of shallower depths that each batch is compared at too. All come of one run of the student, so that only its head and
    the comparison are computed again for each."""

    @property
    def operations(self) -> float:
        """Floating-point operations of all devices together: the forward pass, and twice as many for the backward pass."""
        tokens = self.batches * self.batch * self.length
        teacher = self.follows.flops_per_token(self.length) if self.follows else 0.0
        # At each exit the head, and the similarities of all pairs of texts.
        pairs = 2 * self.batches * self.batch**2 * self.student.output_width
        further = self.exits * 3 * (tokens * 2 * sum(rows * width for rows, width in self._head()) + pairs)
        return tokens * (3 * self.student.flops_per_token(self.length) + teacher) + further

    def memory_bytes(self, devices: int) -> int:
        """Return the bytes on each of `devices` devices, not counting the texts and the teacher's vectors."""
        shape = self.student
        # Quantized layers are trained, or run, as the floating-point values that their integers stand for.
        frozen = shape.parameters + shape.packed_parameters - self.trained
        state = TRAINED_BYTES * self.trained + FROZEN_BYTES * frozen
        if self.sharded and devices > 1:
            # A block's weights and gradients are put together while it runs.
            state = state // devices + 2 * FROZEN_BYTES * shape.largest_segment_bytes // HALF_BYTES
        tokens = -(-self.batch // devices) * self.length
        teacher = FROZEN_BYTES * self.follows.parameters if self.follows else 0
        head = HALF_BYTES * sum(rows for rows, _ in self._head())
        further = self.exits * tokens * (EXIT_BYTES * shape.hidden_size + head)
        return state + tokens * shape.blocks * KEPT_BYTES * shape.hidden_size + shape.activation_bytes(tokens) + teacher + further

    def _head(self) -> list[tuple[int, int]]:
        """Return the shapes of the matrices of a head that is run on each token: NV-Embed's. Others compute next to nothing."""
        found = (info.shape for name, info in self.student.tensors.items() if name.startswith(HEAD_PREFIX))
        return [(shape[0], shape[1]) for shape in found if len(shape) == 2]


def low_rank_parameters(shape: ModelShape, rank: int) -> int:
    """Return the number of parameters of low-rank updates of the blocks' linear layers."""
    return sum(rank * sum(info.shape) for info in shape.block_linears.values())
