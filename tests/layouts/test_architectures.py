"""What depends on how an architecture's blocks are laid out: refused by name where it cannot be done, right where it can."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_layouts
from tests_support import TEXTS, compress_to, encoded, folder_of, half_exact

import compress
from compress.common.errors import UserError
from compress.export import export
from compress.methods.base import Method
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Width
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.models.architectures import BLOCK_LAYOUTS, one_set_of_blocks
from compress.models.network.segments import blocks_of
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe_file import parse_recipe
from compress.runtimes.torch_runtime import open_checkpoint

BY_HEAD = "the position bias has a column for each head"


def made(folder: Path, name: str) -> Path:
    """The folder of a layout."""
    assert not tiny_layouts.make(folder, [name])
    return folder / name


@pytest.mark.parametrize(("kind", "layout"), [("mpnet", "MPNet"), ("deberta-v2", "DeBERTa v2, v3"), ("distilbert", "DistilBERT")])
def test_each_layout_is_known_by_both_of_its_sublayers(make_model, kind: str, layout: str) -> None:
    assert folder_of(make_model(kind)).shape.anatomy is BLOCK_LAYOUTS[layout]


@pytest.mark.parametrize("what", ["attention", "mlp"])
@pytest.mark.parametrize("kind", ["mpnet", "deberta-v2", "distilbert"])
def test_a_dropped_sublayer_adds_nothing(make_model, copy_of, tmp_path: Path, kind: str, what: str) -> None:
    folder = half_exact(copy_of(make_model(kind)))
    compress_to(folder, tmp_path / "variant", Depth(what=what, drop=(1,)))  # type: ignore[arg-type]
    whole = open_checkpoint(folder_of(folder), device="cpu")
    anatomy = folder_of(folder).shape.anatomy
    block = blocks_of(whole.model)[1][1]
    silenced = block.get_submodule(anatomy.output if what == "attention" else anatomy.down)
    silenced.forward = lambda given: given.new_zeros(*given.shape[:-1], whole.dimension)  # type: ignore[method-assign]
    np.testing.assert_allclose(encoded(tmp_path / "variant"), whole.encode(TEXTS), atol=1e-6)


@pytest.mark.parametrize(("kind", "message"), [("mpnet", BY_HEAD), ("deberta-v2", "relative positions are projected to each head")])
def test_heads_that_blocks_do_not_own_stay(make_model, tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(UserError, match=f"heads cannot be dropped, because .*{message}"):
        compress_to(make_model(kind), tmp_path / "variant", Width(heads=0.5))


def test_sizes_are_written_under_the_architecture_s_own_names(make_model, tmp_path: Path) -> None:
    compress_to(make_model("distilbert"), tmp_path / "variant", Depth(drop=(0,)), Width(channels=0.5, heads=0.5))
    config = json.loads((tmp_path / "variant/config.json").read_text())
    assert (config["n_layers"], config["hidden_dim"]) == (1, 40)
    assert "num_hidden_layers" not in config
    np.testing.assert_array_equal(encoded(tmp_path / "variant", stream=True), encoded(tmp_path / "variant"))


def test_gptq_of_deberta_is_nearer_than_rounding(make_model, tmp_path: Path) -> None:
    folder = make_model("deberta-v2")
    compress_to(folder, tmp_path / "gptq", GPTQ(bits=3, group_size=16))
    compress_to(folder, tmp_path / "rtn", RTN(bits=3, group_size=16, activations="none"))
    whole = encoded(folder)
    errors = {name: float(np.square(encoded(tmp_path / name) - whole).sum()) for name in ("gptq", "rtn")}
    assert errors["gptq"] < errors["rtn"]


def test_a_projection_after_the_last_norm_is_walked(tmp_path: Path) -> None:
    folder = made(tmp_path, "embedding_gemma2_text")
    for name in ("modules.json", "1_Pooling/config.json"):  # a plain folder does not say how wide its vectors are
        (folder / name).unlink()
    assert compress.load(folder, device="cpu").dimension == 96
    compress_to(folder, tmp_path / "variant", RTN(activations="dynamic_per_token"))
    vectors = encoded(tmp_path / "variant")
    assert vectors.shape[1] == 96
    np.testing.assert_array_equal(encoded(tmp_path / "variant", stream=True), vectors)
    export(tmp_path / "variant", "sentence-transformers", tmp_path / "out", check=False)
    assert json.loads((tmp_path / "out/1_Pooling/config.json").read_text())["word_embedding_dimension"] == 96
    with pytest.raises(UserError, match="tables hold a row of numbers for each block"):
        compress_to(folder, tmp_path / "shallow", Depth(keep=0.5))


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("albert_mean", RTN(), "all 4 blocks share one set of weights"),
        ("gpt2_weighted", RTN(), "Conv1D"),
        ("gpt2_weighted", GPTQ(), "Conv1D"),
    ],
)
def test_the_plan_refuses_what_the_run_refuses(tmp_path: Path, name: str, step: Method, message: str) -> None:
    folder = made(tmp_path, name)
    recipe = parse_recipe({"steps": [step.model_dump(exclude_defaults=True) | {"method": step.method}]})
    with pytest.raises(UserError, match=message):
        make_plan(recipe, folder_of(folder).shape, tmp_path)
    with pytest.raises(UserError, match=message):
        compress_to(folder, tmp_path / "variant", step)
    assert not (tmp_path / "variant").exists()


def test_blocks_in_groups_are_said_to_share() -> None:
    assert one_set_of_blocks({"num_hidden_groups": 2, "num_hidden_layers": 6}) is not None
    assert one_set_of_blocks({"num_hidden_groups": 6, "num_hidden_layers": 6}) is None
    assert one_set_of_blocks({"num_hidden_layers": 6}) is None
