"""Alignment: a model's vectors are mapped into another model's space, whose index they then search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from compress.layers.scheme import QuantizedLayer
from compress.methods.align.settings import AlignSettings
from compress.methods.base import Bench, Estimate
from compress.models.files.headers import TensorInfo
from compress.models.files.variant import AlignedTo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel


class Align(AlignSettings):
    """Map the model's vectors into another model's space, so that its queries search the other model's index.

    The map is one more Dense module at the end of the head, fitted in closed form on texts that both models embed; dimension,
    normalisation and similarity are then the other model's. Use it to change the model that embeds queries without embedding the
    documents again. With `minutes`, the network is then trained on the same texts to give the other model's vectors.
    """

    method: Literal["align"] = "align"

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Fit the map, train if asked to, and give the model one more module.

        Raises:
            ValueError: one of the models does not allow it, or there are too few texts.
        """
        from compress.methods.align.fitting import Fitting
        from compress.models.source import find

        old = find(self.to)
        fitting = Fitting(self, model, old, bench, str(survey.device))
        found = bench.once(fitting.found)
        bench.report({key: value for key, value in found.items() if key != "aligned_to"})
        return self, fitting.aligned(AlignedTo(**found["aligned_to"]))

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: one more matrix."""
        inputs, outputs = shape.vector_width or shape.output_width, self._width()
        tensors = {
            **shape.as_stored().tensors,
            "text_head.after.map.linear.weight": TensorInfo("F16", (outputs, inputs)),
            "text_head.after.map.linear.bias": TensorInfo("F16", (outputs,)),
        }
        note = f"a map of {inputs} to {outputs} dimensions, those of {self.to}"
        if self.minutes:
            note += f"; then {self.minutes:g} minutes of training"
        return Estimate(
            after=replace(shape, tensors=tensors, vector_width=outputs),
            memory_bytes=8 * (2 * inputs**2 + 2 * inputs * outputs),
            bytes_touched=2 * inputs * outputs,
            note=note,
        )

    def _width(self) -> int:
        """Return the width of the other model's vectors."""
        from compress.models.source import find_shape

        shape = find_shape(self.to, to_compress=True)
        return shape.vector_width or shape.output_width

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Do nothing: `prepare` has made the module before the walk."""
        return {}
