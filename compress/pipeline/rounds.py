"""Prune and heal in rounds: a share of each step at a time, chosen anew on the model as the round before healed it.

So Minitron's models were made (Muralidharan et al. 2024, arXiv 2407.14679, figure 2): the pruned and distilled model takes the
place of the original for the next iteration. A group is expanded into ordinary steps as soon as the model's sizes are known;
whatever is true of steps, such as that a killed run goes on after the last one, is true of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from compress.common.errors import UserError
from compress.methods.base import Method
from compress.models.shape import ModelShape

ROUNDS = "rounds"


class Rounds(BaseModel):
    """Prune and heal in rounds: each drops a share of what is to go, and trains what is left before the next one chooses.

    `depth` spreads the number of blocks over the rounds, `width` goes down by the same factor in each, `distill` gives each round
    the same number of steps and the last one twice as many.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)

    method: Literal["rounds"] = "rounds"
    """Name of the group, which may be left out."""
    rounds: int = Field(ge=1, le=100)
    """Number of rounds."""
    steps: tuple[SerializeAsAny[Method], ...]
    """What is pruned by the end, `depth` and `width` or one of them, and last `distill`, whose `steps` are those of all rounds."""

    @model_validator(mode="after")
    def _can_be_spread(self) -> Self:
        fault = fault_of(self.rounds, self.steps)
        if fault is not None:
            raise ValueError(f"{'.'.join(map(str, fault[0]))}: {fault[1]}")
        return self

    def expanded(self, place: str, shape: ModelShape) -> list[tuple[str, Method]]:
        """Return the steps of all rounds, one after another, each with its place in the recipe.

        Args:
            place: place of the group, such as `steps.0`.
            shape: the model before the group.

        Raises:
            UserError: a step does not fit the model, or there are more rounds than there is to prune.
        """
        places = [f"{place}.steps.{number}" for number in range(len(self.steps))]
        parts = self._parts(self.rounds, places, shape)
        if not _all_prune(parts):
            most = next(rounds for rounds in range(self.rounds - 1, 0, -1) if _all_prune(self._parts(rounds, places, shape)))
            raise UserError(f"{place}.rounds: {self.rounds} rounds are more than there is to prune of {shape.name}", f"take {most}")
        return [
            (f"{where} in round {number} of {self.rounds}", step)
            for number, of_round in enumerate(zip(*parts, strict=True), start=1)
            for where, step in zip(places, of_round, strict=True)
            if step is not None
        ]

    def _parts(self, rounds: int, places: Sequence[str], shape: ModelShape) -> list[tuple[Method | None, ...]]:
        """Return the parts of each step.

        Raises:
            UserError: a step does not fit the model.
        """
        parts: list[tuple[Method | None, ...]] = []
        for place, step in zip(places, self.steps, strict=True):
            try:
                parts.append(step.spread(rounds, shape))
            except ValueError as error:
                raise UserError(f"{place} ({step.method}): {error}") from error
            if _renumbers(self.steps) and any(getattr(part, "overrides", None) for part in parts[-1]):
                raise UserError(
                    f"{place} ({step.method}): blocks of {shape.name} have different sizes, and depth renumbers them in each round",
                    "leave depth out of the rounds, or put it before them",
                )
        return parts


def fault_of(rounds: int, steps: Sequence[Method]) -> tuple[tuple[str | int, ...], str] | None:
    """Return what keeps steps from being done in rounds, whatever the model: the place in the group, and why; None: nothing."""
    for number, step in enumerate(steps):
        fault = step.unspread(rounds)
        if fault is not None:
            return ("steps", number, fault[0]), fault[1]
        if step.method in [other.method for other in steps[:number]]:
            return ("steps", number), f"{step.method} is there already; once is enough, for each round gets a share of it"
        if (step.family == "distilled") != (number == len(steps) - 1):
            return ("steps", number), "each round ends with the one step that heals; put distill last, and only there"
        late = next((other for other in steps[:number] if step.whole and not step.anywhere and not other.whole), None)
        if late is not None:
            return ("steps", number), f"{step.method} changes the model as a whole; put it before {late.method}"
        if getattr(step, "overrides", None) and _renumbers(steps):
            return ("steps", number, "overrides"), "names blocks, which depth renumbers in each round; leave it out, or depth"
    return None if len(steps) > 1 else (("steps",), "prunes nothing; put depth or width before distill")


def _renumbers(steps: Sequence[Method]) -> bool:
    """Whether blocks have other numbers after a round than before it."""
    return any(step.method == "depth" for step in steps)


def _all_prune(parts: Sequence[Sequence[Method | None]]) -> bool:
    """Whether every round has something to prune; `parts`: those of each step, the last of which heals."""
    *pruned, _ = parts
    return all(any(part is not None for part in of_round) for of_round in zip(*pruned, strict=True))
