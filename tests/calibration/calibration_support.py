"""Walks of networks with texts, for tests of what methods see of them."""

from __future__ import annotations

from pathlib import Path

import torch
from tests_support import folder_of, text_side
from torch import nn

from compress.calibration.inputs import Inputs
from compress.calibration.texts import CalibrationTexts, calibration_batches
from compress.data.texts import calibration_texts
from compress.models.network.build import load_network
from compress.models.network.segments import Kind, Parts, Segment
from compress.models.network.walk import Carry, Resident, walk

CPU = torch.device("cpu")


def linears(parts: Parts) -> dict[str, nn.Linear]:
    """The linear layers of a segment."""
    return {f"{p}.{n}": m for p, part in parts.items() for n, m in part.named_modules() if isinstance(m, nn.Linear)}


def visited(folder: Path, texts: CalibrationTexts, visit) -> None:
    """Walk a network with texts and call `visit(segment, parts, inputs)` at blocks and heads."""
    network = load_network(folder_of(folder), torch.float32)
    carry = Carry(texts.batches, CPU)

    def each(index: int, segment: Segment, parts: Parts) -> None:
        if segment.kind in (Kind.BLOCK, Kind.HEAD):
            visit(segment, parts, Inputs(carry, texts, index, segment))

    walk(Resident(network), each, carry)


def batches_of(folder: Path, count: int = 12, prompts: tuple[str, ...] = (), pool_prompt: bool = True) -> CalibrationTexts:
    """Some calibration texts as batches for a model."""
    _, tokenizer = text_side(folder)
    return calibration_batches(tokenizer, calibration_texts()[:count], prompts, pool_prompt=pool_prompt, max_tokens=40)
