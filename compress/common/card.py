"""The graphics card that measurements come from: name, driver, clocks. Asked of `nvidia-smi`, without torch."""

from __future__ import annotations

import shutil
import subprocess

from pydantic import BaseModel, ConfigDict

QUERY = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "power.draw")
"""What is asked of `nvidia-smi`, in the order of the fields of `Card`."""
SECONDS = 20
"""Longest wait for `nvidia-smi`, which takes seconds where the driver has to be loaded first."""


class Card(BaseModel):
    """A card and its state at a moment. A value is None where the driver does not say."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str
    """Name by the driver, such as `NVIDIA H100 80GB HBM3`."""
    driver: str | None = None
    """Version of the driver."""
    clock_mhz: float | None = None
    """Clock of the multiprocessors, in MHz."""
    memory_clock_mhz: float | None = None
    """Clock of the memory, in MHz."""
    most_clock_mhz: float | None = None
    """Highest clock of the multiprocessors, in MHz."""
    celsius: float | None = None
    """Temperature, in degrees Celsius."""
    watts: float | None = None
    """Power, in watts."""


def read_card(which: str | None = None) -> Card | None:
    """Ask `nvidia-smi` for a card; None where there is no such command, or it knows no such card.

    Args:
        which: the card's UUID, index or bus address; None: the first one.
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    line = [command, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", *([f"--id={which}"] if which else [])]
    try:
        said = subprocess.run(line, capture_output=True, text=True, check=False, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parsed(said.stdout) if said.returncode == 0 else None


def parsed(listing: str) -> Card | None:
    """Return the first card of a listing by `nvidia-smi`; values such as `[N/A]` are None."""
    first = next((line for line in listing.splitlines() if line.strip()), "")
    cells = [cell.strip() for cell in first.split(",")]
    if len(cells) != len(QUERY) or not cells[0]:
        return None
    name, driver, *numbers = cells
    clock, memory, most, celsius, watts = map(_number, numbers)
    return Card(
        name=name,
        driver=None if driver.startswith("[") else driver,
        clock_mhz=clock,
        memory_clock_mhz=memory,
        most_clock_mhz=most,
        celsius=celsius,
        watts=watts,
    )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None  # the driver says [N/A] or [Not Supported]
