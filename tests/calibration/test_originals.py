"""The unchanged model next to a walk that changes it: its inputs are the model's own, also after a stop."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from calibration_support import CPU, batches_of, linears
from tests_support import compress_to, folder_of, network_of

from compress.calibration.inputs import Inputs
from compress.calibration.originals import Originals
from compress.calibration.texts import CalibrationTexts
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.base import Method
from compress.methods.quantize.autoround import AutoRound
from compress.methods.quantize.gptq import GPTQ
from compress.models.network.build import load_network
from compress.models.network.segments import Kind, Parts, Segment
from compress.models.network.walk import Carry, Resident, walk
from compress.pipeline.stage import prepare_to_run

KINDS = ["bert", "mistral", "t5"]


class Stopped(Exception):
    """Stands for whatever ends a process."""


def followed(folder: Path, texts: CalibrationTexts, visit, carries: tuple[Carry, Carry]) -> None:
    """Walk a network that `visit(index, parts, inputs)` changes, with the unchanged one next to it."""
    network, unchanged = (load_network(folder_of(folder), torch.float32) for _ in range(2))
    carry, other = carries
    originals = Originals(unchanged, texts, lambda segment: copy.deepcopy(Resident(unchanged).load(segment)), other)

    def each(index: int, segment: Segment, parts: Parts) -> None:
        if segment.kind is Kind.BLOCK:
            visit(index, parts, Inputs(carry, texts, index, segment, originals.at(index)))

    walk(Resident(network), each, carry)


def own_outputs(folder: Path, texts: CalibrationTexts) -> dict[int, torch.Tensor]:
    """The first batch's hidden states after each block of a network that nothing changes."""
    found: dict[int, torch.Tensor] = {}
    carry = Carry(texts.batches, CPU)

    def each(index: int, segment: Segment, parts: Parts) -> None:
        if segment.kind is Kind.BLOCK:
            found[index] = Inputs(carry, texts, index, segment).tokens(parts, 0)

    walk(Resident(load_network(folder_of(folder), torch.float32)), each, carry)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_the_model_s_own_whatever_the_walk_does(make_model, kind: str) -> None:
    folder = make_model(kind)
    texts, drifted, exact = batches_of(folder), list[float](), own_outputs(folder, batches_of(folder))

    def visit(index: int, parts: Parts, inputs: Inputs) -> None:
        assert torch.equal(inputs.original.tokens(0), exact[index])
        layers, seen = linears(parts), dict[str, float]()

        def both(leader: str, rows: torch.Tensor, counts: torch.Tensor, unchanged: torch.Tensor) -> None:
            assert rows.shape == unchanged.shape == (len(counts), layers[leader].in_features)
            seen[leader] = max(seen.get(leader, 0), float((rows - unchanged).abs().max()))

        inputs.see_both(parts, layers, both)
        drifted.append(max(seen.values()))
        for layer in layers.values():
            layer.weight.data *= 1.1

    followed(folder, texts, visit, (Carry(texts.batches, CPU), Carry(texts.batches, CPU)))
    assert drifted[0] == 0  # nothing before the first block has changed
    assert all(drift > 1e-3 for drift in drifted[1:])
    assert len(drifted) > 1


@pytest.mark.parametrize("behind", [False, True], ids=["at the block", "one behind"])
def test_it_goes_on_after_a_stop(make_model, tmp_path: Path, behind: bool) -> None:
    """Whether the stop came in a visit, or when the changing walk had moved on and this one had not."""
    folder = make_model("mistral")
    texts, exact = batches_of(folder), own_outputs(folder, batches_of(folder))
    again, seen = False, []

    def visit(index: int, parts: Parts, inputs: Inputs) -> None:
        if index == 2 and not again:
            raise Stopped
        assert torch.equal(inputs.original.tokens(0), exact[index])
        seen.append(index)
        for layer in linears(parts).values():
            layer.weight.data *= 1.1

    def carries() -> tuple[Carry, Carry]:
        first, second = (Carry(texts.batches, CPU, tmp_path / name) for name in ("texts", "original"))
        return first, second

    if behind:  # block 1 has been visited and passed, block 2 not asked for
        network = load_network(folder_of(folder), torch.float32)
        carry, other = carries()
        originals = Originals(network, texts, Resident(network).load, other)
        stopped = False

        def first_block(index: int, segment: Segment, parts: Parts) -> None:
            nonlocal stopped
            if segment.kind is Kind.BLOCK:
                if stopped:
                    raise Stopped
                stopped = True
                originals.at(index)

        with pytest.raises(Stopped):
            walk(Resident(network), first_block, carry)
        assert (carry.passed, other.passed) == (2, 1)
    else:
        with pytest.raises(Stopped):
            followed(folder, texts, visit, carries())
        assert [one.passed for one in carries()] == [2, 2]
    again = True
    seen.clear()
    followed(folder, texts, visit, carries())
    assert seen == [2]


@pytest.mark.parametrize(
    "step", [GPTQ(drift=1.0, bits=3, group_size=16), AutoRound(bits=3, group_size=16, steps=3)], ids=lambda x: x.method
)
def test_resident_and_streamed_give_the_same_integers(make_model, tmp_path: Path, step: Method) -> None:
    folder = make_model("mistral")
    compress_to(folder, tmp_path / "variant", step, count=12, max_tokens=40)
    streamed = network_of(tmp_path / "variant")
    made: dict[str, torch.Tensor] = {}

    def visit(_: int, parts: Parts, inputs: Inputs) -> None:
        step.apply(parts, inputs)
        for path, part in parts.items():
            for name, layer in part.named_modules():
                if isinstance(layer, QuantizedLinear):
                    made[f"{path}.{name}"] = layer.integers()
        prepare_to_run(parts, torch.float32)

    texts = batches_of(folder)
    followed(folder, texts, visit, (Carry(texts.batches, CPU), Carry(texts.batches, CPU)))
    assert len(made) == 14
    for name, integers in made.items():
        assert torch.equal(streamed.get_submodule(name).integers(), integers), name
