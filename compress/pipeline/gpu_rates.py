"""How fast cards run embedders, from a table in the package's data: measured rates by card, and a published one until then.

A measured card is added to `measured` in `compress/data/gpu_rates.json`, by the name that its driver gives it.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from compress.common.inputs import read_as

TABLE = Path(str(resources.files("compress.data") / "gpu_rates.json"))


class Rate(BaseModel):
    """What a card does with a network of billions of parameters, in one precision."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    card: str
    """Name of the card, as `nvidia-smi` gives it."""
    precision: str
    """Precision of the products, such as `bfloat16` or `fp8`."""
    operations_per_second: float = Field(gt=0)
    """Floating-point operations a second, two for each product and sum."""
    model: str
    """The embedder that was run."""
    tokens_per_second: float = Field(gt=0)
    """Its tokens a second."""
    source: str
    """Where the number is from: the record or the command of a measurement, or who published it."""


class Rates(BaseModel):
    """The table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    measured: tuple[Rate, ...]
    published: Rate


def read_rates(path: Path = TABLE) -> Rates:
    """Read the table.

    Raises:
        UserError: a key is missing, unknown or of a wrong type.
    """
    return read_as(path, Rates)


def rate_for(card: str | None, rates: Rates) -> tuple[float, str]:
    """Return the operations per second to plan with in bfloat16, and where they are from, for people.

    Args:
        card: name of the machine's card; None where there is none.
        rates: the table.
    """
    for rate in rates.measured:
        if rate.card == card and rate.precision == "bfloat16":
            return rate.operations_per_second, f"measured on this card: {rate.operations_per_second / 1e12:.0f} TFLOPS in bfloat16"
    known = rates.published
    where = "not measured on this card" if card else "no card here"
    speed = f"{known.operations_per_second / 1e12:.0f} TFLOPS in {known.precision}"
    return known.operations_per_second, f"{where}; at {speed}, published for {known.model} on an {known.card}"
