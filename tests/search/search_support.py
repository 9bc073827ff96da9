"""Tiny models and few texts for searches."""

from __future__ import annotations

from pathlib import Path

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.data.texts import calibration_texts
from compress.search.scoring import Passages, Scoring
from compress.search.sensitivity import SensitivityOptions, Subject

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
