"""The record of a sensitivity: what each choice for each group of layers does to a model's vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from compress.common.files import write_text_atomic
from compress.common.inputs import read_as
from compress.common.machine import Machine

SUFFIX = ".sensitivity.json"
"""How the file of a record ends; the dashboard shows those that lie in a folder of runs."""


class GroupScores(BaseModel):
    """The scores of a group of layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Block and kind, such as `3.qkv`; or `table`, `head`."""
    block: int | None
    kind: str
    layers: tuple[str, ...]
    parameters: int
    losses: dict[str, float]
    """Loss of each choice: 1 - cosine of the vectors to first order, with all other layers as they are."""
    bytes: dict[str, int]
    """Bytes of the group's tensors with each choice; of a whole block all of the block's."""


class Sensitivity(BaseModel):
    """What each choice for each group of layers does to a model's vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    fingerprint: str
    """Fingerprint of the model's files."""
    how: Literal["derivatives", "forward"]
    """By derivatives of the vectors along random directions, or by running each choice through the rest of the model."""
    runtime: str
    """Runtime whose choices these are."""
    calibrated: int
    """Number of texts that steps calibrated on."""
    scored: int
    """Number of other texts, on which vectors were compared."""
    directions: int
    seed: int
    groups: tuple[GroupScores, ...]
    seconds: float
    """Seconds that it took; of one that was killed and continued, those of the last process."""
    created: str
    machine: Machine
    versions: dict[str, str]

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """The losses by group and choice."""
        return {group.name: group.losses for group in self.groups}

    @property
    def choices(self) -> tuple[str, ...]:
        """The names of all choices, in the order in which they first occur."""
        return tuple(dict.fromkeys(choice for group in self.groups for choice in group.losses))

    def write(self, path: Path) -> None:
        """Write the record."""
        write_text_atomic(path, json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> Sensitivity:
        """Read a record.

        Raises:
            UserError: it is none of this version.
        """
        return read_as(path, cls, "it may have been written by another version")
