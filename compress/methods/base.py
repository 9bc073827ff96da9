"""What every method is: its YAML keys, what it would do to a shape, and doing it. Torch is imported only inside `apply`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict

from compress.layers.scheme import QuantizedLayer
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel


@dataclass(frozen=True)
class Bench:
    """What a run lends a step that looks at the model whole."""

    once: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
    """Returns what a function returned the first time, in this process or in an earlier one that was stopped."""
    folder: Path
    """Keeps the step's files for as long as the run is under way."""
    published: ModelFolder
    """The model that the recipe started from."""
    say: Callable[[str], None]
    """Tells the user how it goes."""
    evaluated: Callable[[], frozenset[str]]
    """Every text of the tasks that the result will be scored on, as `compress.data.texts.same_text` has it."""
    report: Callable[[dict[str, Any]], None]
    """Puts something into the record beside the step's config; once, each time the step is prepared."""


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
    passes: float = 0.0
    """How often the calibration texts go through the whole model beside the walk that all steps share."""
    copies: float = 0.0
    """How many hidden states of every calibration token are in memory at once."""
    quantized: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    """How the layers that it quantizes would be stored, by name."""
    gpus: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """Of a step that several GPUs share: by their number, bytes on each and floating-point operations one after another."""


def share_of(share: float, count: int) -> int:
    """Return how many of `count` a share is, halves up."""
    return math.floor(share * count + 0.5)


class Method(BaseModel):
    """A step of a recipe. Its fields are the keys that a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    method: str

    family: ClassVar[str]
    """What it does to a model, in one word for reports: `smaller`, `sparse`, `distilled`, `quantized`. Empty: the model computes
    the same as before."""
    whole: ClassVar[bool] = False
    """Whether it looks at the model whole or changes what the texts are made of. Such steps come before all others: when they are
    through, the model is walked, segment by segment."""
    anywhere: ClassVar[bool] = False
    """Of such a step: whether it may come after others all the same. The model is then walked twice."""

    @property
    def surveys(self) -> bool:
        """Whether `prepare` looks at what becomes of the calibration texts."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """Files besides the model's that decide what it does: a run whose files have changed is another run."""
        return ()

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

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Decide what depends on the model as a whole, and change what is not inside of a segment: called before the walk.

        Args:
            model: the model, as the steps before left it.
            survey: looks at it.
            bench: keeps decisions and files that were dear; they are not made again when a run goes on.

        Returns:
            The step with its decisions filled in, and the model as the walk is to see it.

        Raises:
            ValueError: the model does not allow it.
        """
        return self, model

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
