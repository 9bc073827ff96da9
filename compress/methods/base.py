"""What every method is: its YAML keys, an estimate of what it does to a shape, and the doing. Torch is imported only inside
`apply`."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from compress.layers.scheme import QuantizedLayer
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.common.ranks import Leader
    from compress.models.folder import ModelFolder
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

UNCHANGED = "as it was"
FAMILIES = ("smaller", "sparse", "distilled", "quantized", "aligned", UNCHANGED)
"""What a method can do to a model, in the order in which reports name them: change its sizes, set weights to zero, train it, store
it in fewer bits, or change nothing but rounding."""


@dataclass(frozen=True)
class Bench:
    """What a run provides to a step that looks at the model as a whole."""

    once: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]]
    """Returns what a function returned the first time, in this process or in an earlier one that was stopped."""
    folder: Path
    """Where the step can keep files while the run is in progress."""
    published: ModelFolder
    """The model that the recipe started from."""
    say: Callable[[str], None]
    """Shows a progress message to the user."""
    evaluated: Callable[[], frozenset[str]]
    """Returns all texts of the tasks that the result will be scored on, normalised by `compress.data.texts.same_text`."""
    report: Callable[[dict[str, Any]], None]
    """Puts results into the record, next to the step's config. It is called once each time the step is prepared."""
    ranks: Leader | None = None
    """The other ranks, on which a step that they share is called; None: this process is alone."""


@dataclass(frozen=True)
class Estimate:
    """What a method would do, from the shape alone."""

    after: ModelShape
    """The shape as it would be stored; the next step's estimate starts from it."""
    memory_bytes: int
    """Peak memory of applying it, in addition to the model itself."""
    bytes_touched: int
    """Bytes read and written while applying it; they determine its time."""
    note: str
    """One line for people."""
    flops: float = 0.0
    """Floating-point operations in addition to passes over the weights and to running the calibration texts."""
    passes: float = 0.0
    """Number of times that the calibration texts go through the whole model, in addition to the walk that all steps share."""
    copies: float = 0.0
    """Number of hidden states of every calibration token that are in memory at the same time."""
    quantized: Mapping[str, QuantizedLayer] = field(default_factory=dict)
    """How the layers that it quantizes would be stored, by name."""
    gpus: Mapping[int, tuple[int, float]] = field(default_factory=dict)
    """For a step that several GPUs can share: for each number of GPUs, the bytes on each and the operations of each."""


def share_of(share: float, count: int) -> int:
    """Return a share of `count`, rounded, halves up."""
    return math.floor(share * count + 0.5)


class StepOverride(BaseModel):
    """Settings of some layers or blocks in the place of a step's own. It is written with what is set, and read back as the same."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _what_is_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if key in self.model_fields_set}


def overridden(name: str, overrides: Mapping[str, StepOverride], nulls: Container[str] = ()) -> dict[str, Any]:
    """Return the settings of the overrides whose pattern matches a name; later ones replace earlier ones.

    `nulls`: keys for which null is a value; of others it says that nothing is set.
    """
    found: dict[str, Any] = {}
    for pattern, override in overrides.items():
        if fnmatchcase(name, pattern):
            given = override.model_dump()
            found |= {key: value for key, value in given.items() if value is not None or key in nulls}
    return found


def check_overrides(overrides: Mapping[str, StepOverride]) -> None:
    """See that every override sets something.

    Raises:
        ValueError: one does not.
    """
    for pattern, override in overrides.items():
        if not override.model_fields_set:
            raise ValueError(f"overrides {pattern!r} sets nothing; give {', '.join(type(override).model_fields)}")


class Method(BaseModel):
    """A step of a recipe. Its fields are the keys that a recipe may set."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    method: str
    """Name of the method."""

    family: ClassVar[str]
    """What it does to a model, in one word: one of `FAMILIES` where that fits. Reports group runs by it."""
    whole: ClassVar[bool] = False
    """Whether it looks at the model as a whole, or changes the tokens. Such steps come before all others; after them the model is
    walked segment by segment."""
    without_blocks: ClassVar[bool] = False
    """Whether it also works on a static table, which has no blocks; see `compress.models.text.static`."""
    anywhere: ClassVar[bool] = False
    """Whether a `whole` step may also come after others. The model is then walked twice."""

    spreads: ClassVar[tuple[str, ...]] = ()
    """Keys that have a value of their own in each round, where the step is done in rounds (`compress.pipeline.rounds`); empty: it
    cannot be."""

    float32: ClassVar[bool] = False
    """Whether it makes weights that half precision would round anew. The calibration texts then run in float32."""

    def shared_by(self, ranks: int) -> bool:
        """Return whether several ranks share the step; all others are done by the first one, while the others wait.

        Raises:
            ValueError: it can be shared, but not by this many.
        """
        return False

    @property
    def surveys(self) -> bool:
        """Whether `prepare` runs the calibration texts through the model."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """Files other than the model's that its result depends on. If one has changed, the run is a new one."""
        return ()

    @property
    def calibrates(self) -> bool:
        """Whether `apply` needs the inputs of a segment on the calibration texts."""
        return False

    @property
    def compares(self) -> bool:
        """Whether `apply` also needs each block, and its inputs, as they were before this walk: `Inputs.original`."""
        return False

    def fits(self, shape: ModelShape) -> bool:
        """Whether the step can be applied to a model of this shape."""
        try:
            self.estimate(shape)
        except ValueError:
            return False
        return True

    def unspread(self, rounds: int) -> tuple[str, str] | None:
        """Return the key because of which the step cannot be done in so many rounds, and the reason; None where it can be."""
        return None if self.spreads else ("method", f"{self.method} is not done in rounds; put it before or after them")

    def spread(self, rounds: int, shape: ModelShape) -> tuple[Self | None, ...]:
        """Return the step's part in each round; done one after another, they end where the step alone would.

        Args:
            rounds: number of rounds, and of what is returned.
            shape: the model before the first round.

        Returns:
            For each round the step with the values that it has there; None where it has nothing to do.

        Raises:
            ValueError: the step does not fit the model, or is not done in rounds.
        """
        raise ValueError(f"{self.method} is not done in rounds")

    @abstractmethod
    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate what `apply` would do to a model of this shape.

        Raises:
            ValueError: the step does not fit the model, for example because a pattern matches no layer.
        """

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Decide what depends on the model as a whole, and change what is outside the segments. It is called before the walk.

        Args:
            model: the model as earlier steps left it.
            survey: runs texts through it.
            bench: keeps expensive decisions and files, so that a resumed run does not make them again.

        Returns:
            The step with its decisions filled in, and the model for the walk.

        Raises:
            ValueError: the model does not allow it.
        """
        return self, model

    @abstractmethod
    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Change one segment of the model. It is called for each segment in turn; the model is never in memory as a whole.

        Args:
            parts: the segment's modules by their names in the network, with weights as stored in the checkpoint. They may be
                changed or replaced, and so may modules inside them.
            inputs: the calibration texts as they arrive at this segment; None if no step of the recipe calibrates, and for segments
                whose input is not rows of hidden states (embeddings and norms).

        Returns:
            How each layer or table that was quantized is stored, by its name in the network.

        Raises:
            ValueError: the segment's weights do not allow it.
        """
