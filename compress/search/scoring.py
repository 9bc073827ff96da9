"""What a scoring is given: the model, its groups and their choices, and the texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.methods.base import Method
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.search.choices import AS_STORED, Choice
from compress.search.groups import Group


@dataclass(frozen=True)
class Passages:
    """The texts of a scoring, and how they are looked at."""

    calibration: CalibrationSource
    """Texts that steps calibrate on."""
    scored: CalibrationSource
    """Other texts, on which vectors are compared."""
    directions: int = 8
    """Random directions in the space of the vectors, for each text."""
    forward: bool = False
    """Whether every choice is run through the rest of the model, instead of taking derivatives."""
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Around:
    """A variant around which scores are taken; without one they are taken around the model as it is."""

    folder: Path
    """Folder of the variant."""
    chosen: Mapping[str, str]
    """The choice of each of its groups, by name. The variant differs from the model in nothing else."""


@dataclass(frozen=True)
class Scoring:
    """A model, its groups and their choices."""

    source: ModelFolder
    shape: ModelShape
    """Shape of the model after `exact`."""
    choices: Mapping[Group, Sequence[Choice]]
    texts: Passages
    journal: Journal
    """Keeps what is known of each segment."""
    exact: Sequence[Method] = ()
    """Steps that change nothing but rounding and come first: NV-Embed's fold."""
    around: Around | None = None
    say: Callable[[str], None] = print

    def of_block(self, block: int | None, *kinds: str) -> list[Group]:
        """Return the groups of a block, or those outside of the blocks, of certain kinds; without kinds all."""
        return [group for group in self.choices if group.block == block and (not kinds or group.kind in kinds)]

    def chosen(self, group: Group) -> str:
        """Return the choice around which a group's scores are taken."""
        return AS_STORED if self.around is None else self.around.chosen.get(group.name, AS_STORED)
