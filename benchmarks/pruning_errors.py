"""Pruning error of each kind of linear layer, before later layers amplify or damp it.

    python benchmarks/pruning_errors.py minilm
    python benchmarks/pruning_errors.py random:nvidia/NV-Embed-v2,num_hidden_layers=2,hidden_size=1024,intermediate_size=3584,...

Every block sees the embedded calibration texts as the unpruned blocks before make them, and each method prunes a copy of it. Error:
|X (W-P)^T|^2 / |X W^T|^2 over the tokens of texts that nothing was calibrated on, mean over the blocks.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from statistics import mean
from typing import Any

import torch

from compress.calibration.inputs import Inputs
from compress.calibration.statistics import Hessian
from compress.calibration.texts import CalibrationSource
from compress.data.texts import calibration_texts, suite_texts
from compress.layers.float_layers import linear
from compress.methods.prune.base import PruneWeights
from compress.methods.prune.magnitude import Magnitude
from compress.methods.prune.sparsegpt import SparseGPT
from compress.methods.prune.wanda import Wanda
from compress.models.architectures import is_block_linear, place_in_block
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.segments import Kind, Parts, Segment, segments_of
from compress.models.network.walk import Carry, Resident
from compress.models.source import find

METHODS: tuple[type[PruneWeights], ...] = (SparseGPT, Wanda, Magnitude)
PATTERNS = ("unstructured", "4:8", "2:4")
HELD_OUT = 256


def linears_of(parts: Parts) -> dict[str, torch.nn.Linear]:
    """Return a block's linear layers by name."""
    named = {f"{path}.{name}": module for path, part in parts.items() for name, module in part.named_modules()}
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, torch.nn.Linear) and is_block_linear(f"{name}.weight", module.weight.dim())
    }


def main() -> None:
    """Prune copies of every block and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--texts", type=int, default=512, help="calibration texts")
    parser.add_argument("--max-tokens", type=int, default=512)
    arguments = parser.parse_args()
    source = find(arguments.model)
    network = load_network(ModelFolder("", source), torch.float32)
    device = torch.device("cpu")
    shown = CalibrationSource(calibration_texts()[: arguments.texts], None, arguments.max_tokens).batches(
        source.tokenizer, source.spec
    )
    held = CalibrationSource(suite_texts()[:HELD_OUT], None, arguments.max_tokens).batches(source.tokenizer, source.spec)
    carries = Carry(shown.batches, device), Carry(held.batches, device)
    errors: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def judge(index: int, segment: Segment, parts: Parts) -> None:
        calibration, other = (Inputs(carry, texts, index, segment) for carry, texts in zip(carries, (shown, held), strict=True))
        layers = linears_of(parts)
        groups, moments = other.gather(parts, layers, Hessian)
        of: dict[str, Any] = {}
        for leader, names in groups.items():
            moment = moments[leader].mean()
            of |= dict.fromkeys(names, moment)
        for kind in METHODS:
            for pattern in PATTERNS:
                pruned = {path: copy.deepcopy(part) for path, part in parts.items()}
                kind(pattern=pattern).apply(pruned, calibration)
                for name, made in linears_of(pruned).items():
                    lost, whole = layers[name].weight - made.weight, layers[name].weight
                    error, size = (float((linear(weight, of[name]) * weight).sum()) for weight in (lost, whole))
                    place = place_in_block(name)
                    assert place is not None
                    errors[kind.model_fields["method"].default, pattern][place[1]].append(error / size)

    segments, resident = segments_of(network), Resident(network)
    with torch.no_grad():
        for index, segment in enumerate(segments):
            parts = resident.load(segment)
            if segment.kind is Kind.BLOCK:
                judge(index, segment, parts)
            for carry in carries:
                if segment.kind is Kind.EMBEDDINGS:
                    carry.enter(network, segments, parts)
                elif segment.kind is Kind.BLOCK:
                    carry.advance(index, parts)
    blocks = sum(segment.kind is Kind.BLOCK for segment in segments)
    print(f"{arguments.model}: {blocks} blocks, {shown.tokens:,} tokens to calibrate on, {held.tokens:,} to judge on")
    names = list(next(iter(errors.values())))
    print("| method | zeros | " + " | ".join(names) + " | mean |\n|" + "---|" * (len(names) + 3))
    for pattern in PATTERNS:
        for kind in METHODS:
            found = errors[kind.model_fields["method"].default, pattern]
            cells = [mean(found[name]) for name in names]
            row = [kind.model_fields["method"].default, pattern, *(f"{cell:.4f}" for cell in (*cells, mean(cells)))]
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
