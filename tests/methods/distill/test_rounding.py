"""Quantization-aware training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distill_support import stored
from tests_support import compress_to

import compress
from compress.common.errors import UserError
from compress.layers.grid import find_grid
from compress.methods.distill.checkpoints import read_curve
from compress.methods.distill.data import different, lessons
from compress.methods.distill.method import Distill
from compress.methods.distill.rounding import Rounded
from compress.methods.quantize.awq import AWQ
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo


@pytest.mark.parametrize("table", [False, True])
def test_integers_learn_and_are_what_was_trained(bert: Path, texts: Path, tmp_path: Path, table: bool) -> None:
    heal = Distill(
        texts=str(texts), held_out=60, steps=40, batch=16, every=20, learning_rate=5e-3, precision="no", integers="trained"
    )
    steps = [
        RTN(bits=3, group_size=16, symmetric=False, activations="none"),
        *([Embeddings(bits=4, group_size=16)] if table else []),
    ]
    compress_to(bert, tmp_path / "rtn", *steps)
    compress_to(bert, tmp_path / "healed", *steps, heal)
    before, after = stored(tmp_path / "rtn"), stored(tmp_path / "healed")
    info = VariantInfo.read(tmp_path / "healed")
    assert info.quantized == VariantInfo.read(tmp_path / "rtn").quantized
    for name in info.quantized:
        assert not torch.equal(before[f"{name}.weight_scale"], after[f"{name}.weight_scale"]), name
        if f"{name}.weight_zero" in before:
            assert torch.equal(before[f"{name}.weight_zero"], after[f"{name}.weight_zero"]), name
    changed = [name for name in info.quantized if not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])]
    assert len(changed) > len(info.quantized) / 2
    read = lessons(different(str(texts), frozenset())[0], None, (), 0, same_prompts=True, seed=0).texts[:60]
    whole = compress.load(str(bert), device="cpu").encode(read)
    cosines = [
        float((compress.load(str(tmp_path / name), device="cpu").encode(read) * whole).sum(axis=1).mean())
        for name in ("rtn", "healed")
    ]
    assert cosines[1] > cosines[0]
    # What was judged while training is what was stored, but for half precision around the integers.
    judged = read_curve(tmp_path / "healed-journal" / "step-0")[-1]["cosine"]
    assert cosines[1] == pytest.approx(judged, abs=0.05 * (1 - judged))


def test_rounding_is_the_grid_s_and_gradients_stop_where_it_ends() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 20)
    grid = find_grid(weight, 3, 8, symmetric=False)
    rounded = Rounded(grid, 20)
    wide = (2 * weight).requires_grad_()
    values = rounded(wide)
    torch.testing.assert_close(values.detach(), grid.values(grid.round(wide.detach())))
    values.sum().backward()
    group = grid.group_of(20)
    inside = (wide.detach() / grid.scale[:, group] + grid.zero[:, group]).sub(3.5).abs() <= 3.5
    torch.testing.assert_close(wide.grad, inside.float())
    # A scale's gradient is what moves its values: the integers at the ends, the rounding's error between.
    steps = (wide.detach() / grid.scale[:, group]).round().clamp(-grid.zero[:, group], 7 - grid.zero[:, group])
    asked = torch.where(inside, steps - wide.detach() / grid.scale[:, group], steps) * grid.scale[:, group]
    expected = torch.stack([asked[:, group == number].sum(dim=1) for number in range(3)], dim=1)
    torch.testing.assert_close(rounded.gain.grad.view(6, 3), expected, atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]


def test_integers_are_not_trained_where_there_are_none(bert: Path, texts: Path, tmp_path: Path) -> None:
    heal = Distill(texts=str(texts), held_out=40, steps=6, batch=16, precision="no", integers="trained")
    with pytest.raises(UserError, match="there are no integers to train"):
        compress_to(bert, tmp_path / "v", heal)
    with pytest.raises(UserError, match=r"query gets its input divided by factors.*keep_factors"):
        compress_to(bert, tmp_path / "w", AWQ(keep_factors=True), heal)
