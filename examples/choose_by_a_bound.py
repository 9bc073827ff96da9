"""Choose by a bound: "at most 9 MB" in, the recipe that changes the vectors least out, and what it keeps.

    python examples/choose_by_a_bound.py                                # the built-in model in at most 9 MB, offline
    python examples/choose_by_a_bound.py FOLDER_OR_HUB_NAME 14MB found

`compress search` is the same as a command, with more bounds (docs/search.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

import compress
from compress.measure.record import Record
from compress.search.budget import Bounds, SearchOptions, search, write_found
from compress.search.options import size_of
from compress.search.sensitivity import SensitivityOptions

OPTIONS = SearchOptions(
    scoring=SensitivityOptions(choices=("int8", "int4", "int3"), per="group", count=128, scored=32),
    trials=4,  # random mixtures that test the predictions; 12 unless said otherwise
    name="bounded",
)
"""Fewer choices and texts than `compress search` takes by itself, for an answer in minutes."""


def choose(model: str, size: str, folder: Path, options: SearchOptions = OPTIONS, tasks: tuple[str, ...] = ("mini",)) -> Record:
    """Find the recipe of least loss in at most `size`, write it to `folder`, and run it there."""
    # 1. Which layer gets how many bits? Each choice is scored by what it does to the vectors; the best mixture is solved exactly.
    found = search(model, Bounds(max_bytes=size_of(size)), options)

    # 2. What could be had in other sizes: the front, from the same scores.
    for point in found.why["front"]:
        print(f"{point['bytes'] / 1e6:6.2f} MB: predicted 1 - cosine {point['predicted']:.4f}")
    why = found.why
    print(f"{why['bytes'] / 1e6:6.2f} MB chosen: predicted {why['predicted']:.4f}, measured {why['measured']:.4f}")

    # 3. A recipe like any other, with the bound as its gate: read it, change it, `compress run` it.
    write_found(found, folder / "bounded.yaml")
    print(f"{folder / 'bounded.yaml'}: {len(found.recipe.steps)} steps")

    # 4. What does it keep? The interval is of the share of the model's mean score.
    untimed = found.recipe.model_copy(update={"measure": found.recipe.measure.model_copy(update={"what": ("fidelity",)})})
    record = compress.run(untimed, tasks=tasks, output=folder)
    print(f"{record.row('variant').size_bytes / 1e6:.2f} MB keep {100 * (record.retained or 0):.2f} % of the mean score")
    for gate in record.gates:
        print(f"gate {gate.name}: {gate.value:.4f}, bound {gate.bound:.4f}: {'kept' if gate.kept else 'missed'}")
    return record


if __name__ == "__main__":
    model, size, folder = (*sys.argv[1:4], *("nano", "9MB", "found")[len(sys.argv) - 1 :])
    choose(model, size, Path(folder))
