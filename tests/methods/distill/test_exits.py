"""`depth: any`: one training whose student can be cut to any depth."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_support import SMALL, stored
from pydantic import ValidationError
from tests_support import TEXTS, compress_to, encoded, folder_of, half_exact, network_of

import compress
from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.export import export
from compress.methods.distill.batches import drawn_depths, tokenized
from compress.methods.distill.checkpoints import CURVE_FILE, read_curve
from compress.methods.distill.method import Distill
from compress.methods.distill.training import TrainingData, _Trainer, train
from compress.methods.prune.depth import Depth
from compress.methods.quantize.rtn import RTN
from compress.models.cut import cut
from compress.models.files.variant import VariantInfo
from compress.models.network.build import load_network
from compress.models.network.exits import Exits
from compress.models.network.segments import blocks_of
from compress.models.source import find, find_shape

ELASTIC = Distill(
    texts="texts.txt", held_out=40, steps=2, batch=16, every=2, learning_rate=1e-3, precision="no", depth="any", processes=1
)


def elastic(texts: Path, **changes: object) -> Distill:
    return Distill(**{**ELASTIC.model_dump(), "texts": str(texts), **changes})


def tokens_of(folder: Path) -> tuple[torch.Tensor, ...]:
    """The padded batch of `TEXTS` of a model: ids, mask, pooled."""
    found = folder_of(folder)
    texts = tokenized(found.tokenizer, TEXTS, [""] * len(TEXTS), found.spec, 128)
    return texts.batch(np.arange(len(TEXTS)))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "nv_embed", "mistral", "gemma3_text", "modernbert", "t5"])
def test_a_cut_variant_gives_the_vectors_of_its_exit(
    kind: str, model_of: Callable[[str], Path], texts: Path, tmp_path: Path
) -> None:
    compress_to(model_of(kind), tmp_path / "v", elastic(texts))
    network = network_of(tmp_path / "v", torch.float32)
    batch = tokens_of(tmp_path / "v")
    exits = Exits(network, *batch[:2])
    blocks = len(blocks_of(network)[1])
    assert exits.shallower == tuple(range(1, blocks))
    with torch.no_grad():
        vectors = dict(enumerate(exits.vectors(*batch, exits.shallower), start=1))
    assert VariantInfo.read(tmp_path / "v").depths == tuple(range(1, blocks + 1))
    for depth in range(1, blocks + 1):
        folder = tmp_path / f"cut-{depth}"
        folder.mkdir()
        cut(folder_of(tmp_path / "v"), depth, folder)
        assert len(blocks_of(network_of(folder))[1]) == depth
        np.testing.assert_allclose(encoded(folder), vectors[depth].numpy(), atol=1e-6, rtol=0)
    np.testing.assert_allclose(encoded(tmp_path / "v"), vectors[blocks].numpy(), atol=1e-6, rtol=0)
    assert np.abs(encoded(tmp_path / "cut-1") - encoded(tmp_path / "v")).max() > 1e-3


def test_what_later_steps_make_of_it_is_cut_too(make_model: Callable[..., Path], texts: Path, tmp_path: Path) -> None:
    model = make_model("modernbert")
    compress_to(model, tmp_path / "v", elastic(texts), RTN())
    export(tmp_path / "v", "variant", tmp_path / "two", depth=2)
    whole, two = (VariantInfo.read(tmp_path / name) for name in ("v", "two"))
    assert two.layers == (0, 1)
    assert two.depths == (1, 2)
    assert two.weights == "int8 less 2 blocks"
    assert 0 < len(two.quantized) < len(whole.quantized)
    network = network_of(tmp_path / "v", torch.float32)
    batch = tokens_of(tmp_path / "v")
    with torch.no_grad():
        expected = Exits(network, *batch[:2]).vectors(*batch, [2])[0]
    np.testing.assert_allclose(encoded(tmp_path / "two"), expected.numpy(), atol=1e-6, rtol=0)
    # Cut once more: as if it had been cut to that depth at once.
    export(tmp_path / "two", "variant", tmp_path / "one", depth=1)
    export(tmp_path / "v", "variant", tmp_path / "at-once", depth=1)
    np.testing.assert_array_equal(encoded(tmp_path / "one"), encoded(tmp_path / "at-once"))


@pytest.mark.parametrize("check", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_cut_is_exported_in_other_layouts(bert: Path, texts: Path, tmp_path: Path, check: bool) -> None:
    compress_to(bert, tmp_path / "v", elastic(texts))
    export(tmp_path / "v", "variant", tmp_path / "one", depth=1)
    said: list[str] = []
    export(tmp_path / "v", "sentence-transformers", tmp_path / "st", said.append, depth=1, check=check)
    assert ("Read back with sentence-transformers" if check else "Not read back") in said[-1]
    config = json.loads((tmp_path / "st" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert {path.name for path in (tmp_path / "st").iterdir()} >= {"README.md", "model.safetensors", "modules.json"}
    np.testing.assert_allclose(encoded(tmp_path / "st"), encoded(tmp_path / "one"), atol=1e-5, rtol=0)


def test_what_was_not_trained_so_is_not_cut(bert: Path, texts: Path, tmp_path: Path) -> None:
    compress_to(bert, tmp_path / "plain", elastic(texts, depth=None))
    assert "depths" not in json.loads((tmp_path / "plain" / "variant.json").read_text())
    with pytest.raises(UserError, match="was not trained to be cut, so that its vectors after 1 blocks mean nothing") as refused:
        export(tmp_path / "plain", "variant", tmp_path / "x", depth=1)
    assert "distill-elastic.yaml" in str(refused.value.hint)
    assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="holds no variant"):
        export(bert, "variant", tmp_path / "x", depth=1)
    compress_to(bert, tmp_path / "v", elastic(texts))
    for depth in (0, 3, -1):
        with pytest.raises(UserError, match=f"was not trained to be cut to depth {depth}"):
            export(tmp_path / "v", "variant", tmp_path / "x", depth=depth)
    with pytest.raises(UserError, match="'variant' is for a variant that is cut"):
        export(tmp_path / "v", "variant", tmp_path / "x")


@pytest.mark.parametrize("after", [Depth(drop=(0,)), Depth(drop=(0,), what="attention"), "distill"])
def test_a_later_step_that_changes_the_depths_takes_the_note_back(
    after: Depth | str, bert: Path, texts: Path, tmp_path: Path
) -> None:
    step = elastic(texts, depth=None) if isinstance(after, str) else after
    compress_to(bert, tmp_path / "v", elastic(texts), step)
    assert VariantInfo.read(tmp_path / "v").depths == ()


def problem(bert: Path) -> TrainingData:
    """Texts, and the vectors that a model gives them after its last block."""
    found = folder_of(bert)
    texts = list(suite_texts()[:360])
    rows = [tokenized(found.tokenizer, part, [""] * len(part), found.spec, 64) for part in (texts[:320], texts[320:])]
    vectors = compress.load(str(bert), device="cpu").encode(texts)
    return TrainingData(rows[0], vectors[:320], rows[1], vectors[320:])


def test_all_depths_learn_in_one_training(bert: Path, tmp_path: Path) -> None:
    data = problem(bert)
    network = load_network(folder_of(bert), torch.float32).requires_grad_(True)
    train(network, data, elastic(bert, steps=60, every=20, objectives={"cosine": 1.0}), tmp_path / "t")
    curve = read_curve(tmp_path / "t")
    assert set(curve[0]) == {"step", "loss", "cosine", "cosine_1", "seconds"}
    assert curve[-1]["cosine_1"] > curve[0]["cosine_1"] + 0.01
    assert curve[-1]["cosine"] > 0.97  # it is the teacher, and stays near it
    # What the curve says of an exit is what a network of that depth gives.
    batch = data.held_out.batch(np.arange(len(data.held_out)))
    with torch.no_grad():
        one = Exits(network, *batch[:2]).vectors(*batch, [1])[0]
    expected = torch.cosine_similarity(one, torch.from_numpy(data.held_out_targets)).mean()
    assert curve[-1]["cosine_1"] == pytest.approx(float(expected), abs=1e-5)


def test_the_loss_is_the_mean_over_the_depths(bert: Path) -> None:
    data = problem(bert)
    network = load_network(folder_of(bert), torch.float32).requires_grad_(True)
    trainer = _Trainer(network, data, elastic(bert, objectives={"cosine": 1.0, "mse": 0.5}), None, True)
    chosen = np.arange(16)
    batch = data.texts.batch(chosen)
    teacher = torch.from_numpy(data.targets[chosen])
    found, _ = trainer._losses(batch, teacher, (1,))
    one, whole = Exits(network, *batch[:2]).vectors(*batch, [1])
    losses = [
        (1 - torch.cosine_similarity(vectors, teacher)).mean() + 0.5 * (vectors - teacher).square().sum(dim=1).mean()
        for vectors in (one, whole)
    ]
    assert float(found.detach()) == pytest.approx(float((losses[0] + losses[1]).detach()) / 2, rel=1e-5)


def test_depths_are_drawn_by_the_seed_and_the_batch() -> None:
    drawn = [drawn_depths(range(1, 6), 2, 0, batch) for batch in range(500)]
    assert all(list(one) == sorted(set(one)) and len(one) == 2 for one in drawn)
    counts = [sum(depth in one for one in drawn) for depth in range(1, 6)]
    assert min(counts) > 150  # 200 each are expected
    assert drawn == [drawn_depths(range(1, 6), 2, 0, batch) for batch in range(500)]
    assert drawn != [drawn_depths(range(1, 6), 2, 1, batch) for batch in range(500)]
    assert drawn_depths(range(1, 3), 5, 0, 0) == (1, 2)


class Killed(Exception):
    pass


def test_a_killed_training_draws_the_depths_of_one_that_was_not(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model("modernbert")
    data = problem(model)
    asked = elastic(model, steps=6, every=2, exits=1, accumulate=2)

    def student() -> torch.nn.Module:
        return load_network(folder_of(model), torch.float32).requires_grad_(True)

    def die(_: str) -> None:
        raise Killed

    whole, again = student(), student()
    train(whole, data, asked, tmp_path / "whole")
    with pytest.raises(Killed):
        train(student(), data, asked, tmp_path / "killed", say=die)
    train(again, data, asked, tmp_path / "killed")
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    curves = [(tmp_path / name / CURVE_FILE).read_text().splitlines() for name in ("whole", "killed")]
    assert [json.loads(line) | {"seconds": 0} for line in curves[0]] == [json.loads(line) | {"seconds": 0} for line in curves[1]]


@pytest.mark.slow  # two processes are in test_job, all depths in one process here
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_learn_all_depths_as_one_does(bert: Path, texts: Path, tmp_path: Path, sharded: bool) -> None:
    asked = {"steps": 4, "every": 2}
    compress_to(bert, tmp_path / "one", elastic(texts, **asked))
    compress_to(bert, tmp_path / "two", elastic(texts, **asked, processes=2, sharded=sharded))
    one, two = (read_curve(tmp_path / f"{name}-journal" / "step-0") for name in ("one", "two"))
    for key in ("step", "loss", "cosine", "cosine_1"):
        assert [look[key] for look in two] == pytest.approx([look[key] for look in one], rel=1e-3)
    first, second = stored(tmp_path / "one"), stored(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": None, "exits": 3}, "`exits` has no effect without `depth: any`"),
        ({"hidden": 1.0}, "`depth: any` makes each block's output a last one, `hidden` the teacher's in between"),
        ({"lora": 4}, "`lora` keeps the norm and the head that all depths share as they are"),
        ({"student": {"architecture": "static", "width": 8}}, "a static table has no blocks that it could be cut to"),
        ({"depth": 3}, "Input should be 'any'"),
        ({"exits": 0}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Distill(**{**ELASTIC.model_dump(), **changes})


def test_a_student_that_cannot_be_cut_is_refused_before_anything_is_computed(bert: Path) -> None:
    one = Distill(**{**ELASTIC.model_dump(), "student": {**SMALL, "blocks": 1}})
    with pytest.raises(ValueError, match="no effect on a student of one block"):
        one.estimate(folder_of(bert).shape)


def test_a_plan_counts_the_exits() -> None:
    nv, minilm = find_shape("nvidia/NV-Embed-v2"), find("minilm").shape
    asked = {**ELASTIC.model_dump(), "steps": 1000, "batch": 64}
    plain, two, five = (Distill(**{**asked, **how}) for how in ({"depth": None}, {}, {"exits": 5}))
    for shape in (nv, minilm):
        flops, memory = ([step.estimate(shape).gpus[1][place] for step in (plain, two, five)] for place in (1, 0))
        assert flops[0] < flops[1] < flops[2]
        assert flops[2] - flops[0] == pytest.approx(2.5 * (flops[1] - flops[0]))
        assert memory[0] <= memory[1] <= memory[2]
    # All exits of one run: the blocks are not computed again for each.
    assert two.estimate(minilm).flops < 1.05 * plain.estimate(minilm).flops
    hundred = Distill(**{**asked, "exits": 100})
    assert hundred.estimate(minilm).flops == five.estimate(minilm).flops
    assert "each at the whole depth and 5 of 5 shallower ones" in hundred.estimate(minilm).note


def test_half_precision_changes_nothing_between_exit_and_cut(bert: Path, texts: Path, tmp_path: Path) -> None:
    """The vectors that were trained are those of the variant, where storing it in half precision rounds nothing."""
    model = half_exact(Path(shutil.copytree(bert, tmp_path / "model")))
    compress_to(model, tmp_path / "v", elastic(texts, learning_rate=1e-12))
    export(tmp_path / "v", "variant", tmp_path / "one", depth=1)
    batch = tokens_of(model)
    with torch.no_grad():
        expected = Exits(load_network(folder_of(model), torch.float32), *batch[:2]).vectors(*batch, [1])[0]
    np.testing.assert_allclose(encoded(tmp_path / "one"), expected.numpy(), atol=1e-6, rtol=0)
