"""AutoRound: gradients against finite differences, what it learns, and that it learns the same again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import compress_to, folder_of, network_of

import compress
from compress.common.errors import UserError
from compress.layers.grid import Grid, find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.base import Method
from compress.methods.prune.magnitude import Magnitude
from compress.methods.quantize.autoround import AutoRound
from compress.methods.quantize.offsets import Offsets
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo
from compress.pipeline.recipe_file import parse_recipe

GROUPS = {"bits": 3, "group_size": 16, "symmetric": False}
GRIDS = [(4, 16, False), (3, None, True), (8, None, True), (2, 24, False)]


def offsets_of(bits: int, group_size: int | None, symmetric: bool) -> tuple[torch.Tensor, Grid, Offsets]:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    grid = find_grid(weight, bits, group_size, symmetric)
    return weight, grid, Offsets(weight, grid)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_without_offsets_it_is_plain_rounding(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, grid, offsets = offsets_of(bits, group_size, symmetric)
    integers, found = offsets.integers()
    assert torch.equal(found.zero, grid.zero)
    torch.testing.assert_close(found.scale, grid.scale)
    assert (integers == grid.round(weight)).float().mean() > 0.99


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_what_is_stored_is_what_was_learned(bits: int, group_size: int | None, symmetric: bool) -> None:
    weight, _, offsets = offsets_of(bits, group_size, symmetric)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        offsets.offset.uniform_(-0.5, 0.5, generator=generator)
        offsets.upper.uniform_(0.5, 1, generator=generator)
        offsets.lower.uniform_(0.5, 1, generator=generator)
    integers, grid = offsets.integers()
    layer = QuantizedLinear.from_integers(integers, grid, None)
    assert torch.equal(layer.dequantized(), offsets(weight).detach())
    # Rounded up or down and nothing else, where the range does not clip.
    steps = weight / grid.scale[:, grid.group_of(40)] + grid.zero[:, grid.group_of(40)]
    inside = (steps > grid.lowest) & (steps < grid.highest)
    assert ((integers - steps).abs() <= 1)[inside].all()
    assert (integers != grid.round(weight)).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_those_of_the_formula(symmetric: bool) -> None:
    """With the rounding held fixed, s (W / s + V + const) has these derivatives; checked by finite differences."""
    weight, _, offsets = offsets_of(4, None, symmetric)
    scale, zero = (x.detach() for x in (offsets.grid().scale, offsets.grid().zero))
    integers = offsets.integers()[0]
    inside = (integers > 1) & (integers < 15)  # where the grid ends there are two derivatives
    wanted = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)) * inside
    (offsets(weight) * wanted).sum().backward()
    rounding = ((weight / scale).round() - weight / scale).detach()

    def held(upper: torch.Tensor, lower: torch.Tensor, offset: torch.Tensor) -> float:
        low, high = offsets.low * lower, offsets.high * upper
        bound = torch.maximum(-low, high) / 7 if symmetric else torch.maximum(high / (15 - zero), -low / zero)
        steps = torch.minimum(torch.maximum(weight / bound + offset + rounding, offsets._grid.lowest - zero), 15 - zero)
        return float((steps.double() * bound * wanted).sum())

    one, none = torch.ones_like(scale), torch.zeros_like(weight)
    step = 1e-3
    for row in range(6):
        ends = one.clone()
        ends[row] -= step  # both ends: either decides, and a range can only shrink
        change = (held(one, one, none) - held(ends, ends, none)) / step
        assert change == pytest.approx(float(offsets.upper.grad[row] + offsets.lower.grad[row]), rel=0.02, abs=0.02)
    row, column = (int(place) for place in inside.nonzero()[17])
    shifted = none.clone()
    shifted[row, column] = step
    change = (held(one, one, shifted) - held(one, one, none)) / step
    assert change == pytest.approx(float(offsets.offset.grad[row, column]), rel=0.02, abs=0.02)


def made_by(folder: Path, target: Path, step: Method, count: int = 24) -> bytes:
    """The weights' file of a variant."""
    compress_to(folder, target / "variant", step, count=count, max_tokens=40)
    return (target / "variant" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_it_keeps_more_of_the_vectors_than_plain_rounding(make_model, mixed_texts, tmp_path: Path, kind: str) -> None:
    """On texts that it has not learned from; and it is as large as planned."""
    folder = make_model(kind)
    texts = [text for text in mixed_texts if text.strip()][:60]
    baseline = compress.load(str(folder), device="cpu").encode(texts)
    lost = {}
    for step in (RTN(activations="none", **GROUPS), AutoRound(steps=25, **GROUPS)):
        made_by(folder, tmp_path / step.method, step)
        made = compress.load(str(tmp_path / step.method / "variant"), device="cpu").encode(texts)
        lost[step.method] = float(1 - (baseline * made).sum(axis=1).mean())
    assert lost["autoround"] < 0.9 * lost["rtn"]
    planned = step.estimate(folder_of(folder).shape).after.tensors
    stored = folder_of(tmp_path / "autoround" / "variant").headers
    quantized = VariantInfo.read(tmp_path / "autoround" / "variant").quantized
    assert quantized
    for name in (name for name in planned if name.rpartition(".")[0] in quantized):
        assert (stored[name].dtype, stored[name].shape) == (planned[name].dtype, planned[name].shape), name


def test_the_seed_decides(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.calibration.texts.BATCH_TOKENS", 200)  # several batches
    first, again, other = (
        made_by(bert, tmp_path / name, AutoRound(steps=6, learning_rate=0.01, seed=seed, **GROUPS))
        for name, seed in (("first", 0), ("again", 0), ("other", 1))
    )
    assert again == first
    assert other != first


def test_pruned_weights_stay_zero(bert: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "pruned" / "variant", Magnitude())
    compress_to(bert, tmp_path / "variant", Magnitude(), AutoRound(group_size=16, steps=6))
    pruned, network = network_of(tmp_path / "pruned" / "variant"), network_of(tmp_path / "variant")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, QuantizedLinear)}
    assert layers
    for name, layer in layers.items():
        zero = pruned.get_submodule(name).weight == 0
        assert zero.float().mean() > 0.4
        assert (layer.dequantized()[zero] == 0).all()


def test_what_gradients_do_not_pass_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps\.1 \(autoround\): .* is quantized already, and passes no gradients"):
        compress_to(bert, tmp_path / "variant", RTN(skip=("*.output.dense",)), AutoRound(group_size=16))
    with pytest.raises(UserError, match="leave `head` out"):
        parse_recipe({"steps": [{"method": "autoround", "head": True}]})
