"""What several tests need: where to look for what is not in the project, and methods applied to networks in memory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from compress.apply import make_variant
from compress.loading import find
from compress.methods.base import Method
from compress.models.segments import segments_of
from compress.models.shape import read_shape
from compress.models.variant import QuantizedLayer
from compress.record import Journal
from compress.walk import Resident

SHARED = Path(__file__).parents[2] / "shared"


def apply_in_memory(network: nn.Module, *steps: Method) -> dict[str, QuantizedLayer]:
    """Apply steps to a network that is in memory, in place."""
    quantized: dict[str, QuantizedLayer] = {}
    for segment in segments_of(network):
        parts = Resident(network).load(segment)
        for step in steps:
            quantized |= step.apply(parts)
        for path, module in parts.items():
            network.set_submodule(path, module)
    return quantized


def compress_to(folder: Path, target: Path, *steps: Method) -> None:
    """Write the variant of a model's folder."""
    make_variant(
        find(str(folder)), read_shape("tiny", folder), steps, "0", target, Journal(target.with_name("journal")), lambda _: None
    )
