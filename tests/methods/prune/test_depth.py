"""Depth pruning: what is left is the same model without what went."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests_support import TEXTS, compress_to, encoded, estimated_shapes, folder_of, half_exact, same_names, stored_shapes

from compress.common.errors import UserError
from compress.data.texts import calibration_texts
from compress.export import export
from compress.methods.prune.depth import Depth
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.network.segments import blocks_of
from compress.runtimes.torch_runtime import open_checkpoint

KINDS = ["bert", "mistral", "qwen3", "modernbert", "gemma3_text", "nv_embed"]


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_blocks_are_as_if_they_passed_their_input_on(model_of, copy_of, tmp_path: Path, kind: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    first = folder_of(folder).shape.layers[0]
    gone = (first + 1,)  # ModernBERT's first block has no norm of its own, and no other can stand in for it
    step = Depth(drop=gone)
    compress_to(folder, tmp_path / "variant", step)
    whole = open_checkpoint(ModelFolder("whole", folder), device="cpu")
    for number in gone:
        blocks_of(whole.model)[1][number].forward = lambda hidden_states, *_, **__: hidden_states  # type: ignore[method-assign]
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=1e-6)
    info = VariantInfo.read(tmp_path / "variant")
    assert info.layers == tuple(number for number in folder_of(folder).shape.layers if number not in gone)
    assert info.steps[0]["drop"] == list(gone)
    assert same_names(estimated_shapes(folder, step), stored_shapes(tmp_path / "variant"))
    np.testing.assert_array_equal(encoded(tmp_path / "variant"), encoded(tmp_path / "variant", stream=True))


@pytest.mark.parametrize("what", ["attention", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_sublayer_adds_nothing(model_of, copy_of, tmp_path: Path, kind: str, what: str) -> None:
    folder = half_exact(copy_of(model_of(kind)))
    step = Depth(what=what, drop=(1,))  # type: ignore[arg-type]
    compress_to(folder, tmp_path / "variant", step)
    whole = open_checkpoint(ModelFolder("whole", folder), device="cpu")
    anatomy = folder_of(folder).shape.anatomy
    block = blocks_of(whole.model)[1][1]
    silenced = block.get_submodule(anatomy.output if what == "attention" else anatomy.down)
    silenced.forward = lambda given: given.new_zeros(*given.shape[:-1], whole.dimension)  # type: ignore[method-assign]
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=1e-6)
    assert VariantInfo.read(tmp_path / "variant").dropped == ((1, what),)
    assert same_names(estimated_shapes(folder, step), stored_shapes(tmp_path / "variant"))
    with pytest.raises(UserError, match=r"without a sublayer|cannot be stored in"):
        export(tmp_path / "variant", "sentence-transformers", tmp_path / "out")


@pytest.mark.parametrize("criterion", ["greedy", "pooled", "influence", "angular"])
def test_each_criterion_finds_the_block_that_does_nothing(make_model, tmp_path: Path, criterion: str) -> None:
    folder = make_model("modernbert")  # four blocks, the first of which has to stay
    idle = 2
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if f"layers.{idle}." in name and name.endswith(("attn.Wo.weight", "mlp.Wo.weight")):
            weights[name] = tensor * 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    compress_to(folder, tmp_path / "variant", Depth(keep=0.75, criterion=criterion))  # type: ignore[arg-type]
    assert VariantInfo.read(tmp_path / "variant").layers == (0, 1, 3)
    assert (encoded(tmp_path / "variant") * encoded(folder)).sum(axis=1).min() > 0.999
    types = json.loads((tmp_path / "variant" / "config.json").read_text())["layer_types"]
    assert types == ["sliding_attention", "full_attention", "full_attention"]


def test_greedy_looks_at_the_rest_anew(make_model, tmp_path: Path) -> None:
    """Leaving out what `greedy` chose costs no more than any other pair that contains its first choice."""
    folder = make_model("modernbert")
    compress_to(folder, tmp_path / "greedy", Depth(keep=0.5))
    kept = VariantInfo.read(tmp_path / "greedy").layers
    assert kept is not None
    chosen = tuple(number for number in range(4) if number not in kept)
    compress_to(folder, tmp_path / "one", Depth(keep=0.75))
    (first,) = {0, 1, 2, 3} - set(VariantInfo.read(tmp_path / "one").layers or ())
    assert first in chosen
    texts = list(calibration_texts()[:24])
    whole, losses = encoded(folder, texts), {}
    for other in {1, 2, 3} - {first}:
        pair = tuple(sorted((first, other)))
        compress_to(folder, tmp_path / f"{other}" / "v", Depth(drop=pair))
        losses[pair] = 1 - float((encoded(tmp_path / f"{other}" / "v", texts) * whole).sum(axis=1).mean())
    assert min(losses, key=losses.__getitem__) == chosen


def test_the_first_block_of_modernbert_stays(make_model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.0 has other tensors than"):
        compress_to(make_model("modernbert"), tmp_path / "variant", Depth(drop=(0,)))
