"""A run that several ranks share: the first one is the run, the others do their part of its trainings and end as it ends."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from compress import __version__
from compress.common.errors import UserError
from compress.common.files import naming
from compress.common.ranks import Leader, Place, following, leading
from compress.measure.record import Record
from compress.pipeline.recipe import Recipe

PACKAGES = ("torch", "transformers", "numpy")
"""Packages that have to be the same on all ranks: what the ranks send each other are their objects."""
Say = Callable[[str], None]


def run_among_ranks(place: Place, recipe: Recipe, output: Path, work: Callable[[Say, Leader], Record], say: Say) -> Record:
    """Do a run with the other ranks; each of them calls this.

    Args:
        place: this process's place among them.
        recipe: the recipe, with everything that the command overrides.
        output: folder of the runs, which all ranks have to share.
        work: does the run, as the first rank.
        say: called with lines of progress.

    Returns:
        The record, on every rank.

    Raises:
        UserError: no step can be shared, a rank is gone or failed, or what the run raises; on every rank.
    """
    _check_shared(recipe, place.ranks)
    output = output.absolute()
    about = {
        "recipe": hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:12],
        "folder of runs": str(output),
        "version of compress": __version__,
        **{f"version of {package}": version(package) for package in PACKAGES},
    }
    if place.rank:
        with following(place, about) as first:
            say(f"{place}: joined; waiting for the steps that train")
            record: Record = first.until_it_ends()
            return record
    with naming(output):
        output.mkdir(parents=True, exist_ok=True)
    with leading(place, about, output) as ranks:
        say(f"{place}: all are here; they share the steps that train")

        def saying(line: str) -> None:
            ranks.check()  # also where nothing is trained: the loss of a rank is not found out hours later
            say(line)

        record = work(saying, ranks)
        ranks.end(record)
        return record


def _check_shared(recipe: Recipe, ranks: int) -> None:
    """See that a step can be shared by this many ranks.

    Raises:
        UserError: none can.
    """
    shared = False
    for place, step in recipe.placed:
        try:
            shared |= step.shared_by(ranks)
        except ValueError as error:
            raise UserError(f"{place} ({step.method}): {error}") from error
    if not shared:
        raise UserError(
            f"WORLD_SIZE says that {ranks} ranks were started, and no step of the recipe trains: they would have nothing to share",
            "run it without torchrun",
        )
