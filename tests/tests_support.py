"""What several tests need: where to look for what is not in the project, and methods applied to networks in memory."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from torch import nn

from compress.calibration.texts import CalibrationSource
from compress.common.journal import Journal
from compress.data.texts import calibration_texts
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Method
from compress.models.network.segments import segments_of
from compress.models.network.walk import Resident
from compress.models.shape import read_shape
from compress.models.source import find
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = Path(__file__).parent / "models" / "golden"


def golden_weights(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The golden checkpoint's weights, which follow from the seed, key by key."""
    made = {}
    for key, shape in shapes.items():
        r = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
        if "norm" in key:
            r = 1 + 0.2 * r if key.endswith("weight") else 0.1 * r
        elif key.endswith("bias"):
            r = 0.1 * r
        else:
            r = 0.5 * r if "embed_tokens" in key or key.endswith("latents") else r * 1.5 / np.sqrt(shape[1])
        made[key] = r.astype(np.float32)
    return made


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


def compress_to(folder: Path, target: Path, *steps: Method, count: int = 24, max_tokens: int = 120) -> None:
    """Write the variant of a model's folder, calibrated on some of the embedded texts."""
    texts = CalibrationSource(calibration_texts()[:count], None, max_tokens)
    journal = Journal(target.with_name(f"{target.name}-journal"))
    options = BuildOptions("0", lambda _: None, calibration=texts)
    make_variant(find(str(folder)), read_shape("tiny", folder), steps, target, journal, options)
