"""Tiny models and few texts for searches."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.data.texts import calibration_texts
from compress.search.scores import Passages, Scoring
from compress.search.sensitivity import SensitivityOptions, Subject
from compress.search.sweep_worker import Outcome, RunUnit, make_runner

FEW = SensitivityOptions(choices=("int8", "int4", "int3"), count=24, scored=16, max_tokens=40)


def scoring(model: Path, folder: Path, options: SensitivityOptions = FEW, **how: object) -> Scoring:
    """A scoring of a tiny model."""
    subject = Subject(str(model), options)
    passages = Passages(
        CalibrationSource(calibration_texts()[:24], ("",), 40),
        CalibrationSource(calibration_texts()[24:40], ("",), 40),
        directions=options.directions,
        forward=options.forward,
    )
    return Scoring(subject.source, subject.shape, subject.choices, passages, Journal(folder), subject.exact, **how)  # type: ignore[arg-type]


def deadly_runner() -> Callable[[RunUnit], Outcome]:
    """Make a worker that dies once: while its first run has finished some of its work."""
    work = make_runner()

    def once_dying(unit: RunUnit) -> Outcome:
        mark = Path(unit.output) / "died"

        def watch() -> None:
            while not list(Path(unit.output).glob(".*.partial/journal/*.json")):
                time.sleep(0.01)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        if not mark.exists():
            threading.Thread(target=watch, daemon=True).start()
        return work(unit)

    return once_dying
