"""What every method is: its YAML keys, what it would do to a shape, and doing it. Torch is imported only inside `apply`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from compress.layers.scheme import QuantizedLayer
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration import Inputs
    from compress.models.segments import Parts


@dataclass(frozen=True)
class Estimate:
    """What a method would do, from the shape alone."""

    after: ModelShape
    """The shape as it would be stored; the next step's estimate starts from it."""
    memory_bytes: int
    """Most memory that applying it takes beside the model itself."""
    bytes_touched: int
    """Bytes read and written while applying it, which is what its time depends on."""
    note: str
    """One line for people."""
    flops: float = 0.0
    """Floating-point operations beside passes over the weights and running the calibration texts."""
    quantized: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    """How the layers that it quantizes would be stored, by name."""


class Method(BaseModel):
    """A step of a recipe. Its fields are the keys that a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    method: str

    @property
    def calibrates(self) -> bool:
        """Whether `apply` wants the inputs of a segment on calibration texts."""
        return False

    def fits(self, shape: ModelShape) -> bool:
        """Whether the step can be applied to a model of this shape."""
        try:
            self.estimate(shape)
        except ValueError:
            return False
        return True

    @abstractmethod
    def estimate(self, shape: ModelShape) -> Estimate:
        """Say what `apply` would do to a model of this shape.

        Raises:
            ValueError: the step does not fit the model, say because a pattern matches no layer.
        """

    @abstractmethod
    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Change a segment of the model; called for each of its segments in turn, the model itself is never whole.

        Args:
            parts: the segment's modules by their names in the network, their weights as the checkpoint stores them. They may be
                changed or replaced, here or inside of them.
            inputs: the calibration texts as they arrive at this segment; None where no step of the recipe calibrates, and for
                segments that texts do not pass as rows: embeddings and norms.

        Returns:
            How each layer or table that was quantized is stored, by its name in the network.

        Raises:
            ValueError: the segment's weights do not allow it.
        """
