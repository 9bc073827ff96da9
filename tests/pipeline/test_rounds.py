"""Groups that are done in rounds: what each round gets, where they end, how a killed run goes on, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests_support import compress_to, folder_of, stored_shapes

from compress.common.errors import UserError
from compress.data.texts import suite_texts
from compress.methods.base import Method
from compress.methods.distill import training
from compress.methods.distill.batches import batches_from
from compress.methods.distill.checkpoints import Checkpoints
from compress.methods.distill.method import Distill
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Shares, Width, sizes_of
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape
from compress.models.source import find_shape
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe import Recipe, placed_steps, steps_for
from compress.pipeline.recipe_file import parse_recipe, read_recipe
from compress.pipeline.rounds import Rounds
from compress.search.sweep_file import read_sweep

HEAL = Distill(method="distill", texts="t.jsonl", steps=1200)


def bert_shape(blocks: int = 12, channels: Sequence[int] | int = 3072, heads: int = 12) -> ModelShape:
    """The shape of a BERT with these sizes, without its embeddings."""
    each = [channels] * blocks if isinstance(channels, int) else channels
    tensors = {}
    for block in range(blocks):
        path, width, wide = f"encoder.layer.{block}", 64 * heads, each[block]
        layers = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        layers |= {
            "attention.output.dense": (width, width),
            "intermediate.dense": (wide, width),
            "output.dense": (width, wide),
        }
        for layer, size in layers.items():
            tensors[f"{path}.{layer}.weight"] = TensorInfo("F32", size)
            tensors[f"{path}.{layer}.bias"] = TensorInfo("F32", size[:1])
    config = {"model_type": "bert", "hidden_size": 64 * heads, "num_hidden_layers": blocks, "num_attention_heads": heads}
    return ModelShape("tiny", tensors, config | {"intermediate_size": each[0]})


def ends(steps: Sequence[Method], shape: ModelShape) -> ModelShape:
    for step in steps:
        shape = step.estimate(shape).after
    return shape


def sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in shape.tensors.items()}


def group(*steps: Method, rounds: int = 3) -> Recipe:
    return Recipe(steps=(Rounds(rounds=rounds, steps=(*steps, HEAL)),))


def said(steps: Sequence[Method], keys: dict[str, str]) -> list[tuple[str, Any]]:
    return [(step.method, getattr(step, keys[step.method])) for step in steps]


def test_the_split_is_known() -> None:
    steps = steps_for(group(Depth(keep=7 / 12), Width(channels=0.125)), bert_shape(channels=1024))
    assert [step.method for step in steps] == ["depth", "width", "distill"] * 3
    # Five of twelve blocks: two, two, one.
    assert [step.keep for step in steps if isinstance(step, Depth)] == [10 / 12, 8 / 10, 7 / 8]
    # An eighth in three rounds: a half each.
    assert [step.channels for step in steps if isinstance(step, Width)] == [0.5, 0.5, 0.5]
    # One, one and two shares of the steps, and texts that no round before has seen.
    heals = [step for step in steps if isinstance(step, Distill)]
    assert [(step.steps, step.first_batch) for step in heals] == [(300, 0), (300, 300), (600, 600)]
    assert [place for place, _ in placed_steps(group(Depth(keep=0.5)), bert_shape())][:3] == [
        "steps.0.steps.0 in round 1 of 3",
        "steps.0.steps.1 in round 1 of 3",
        "steps.0.steps.0 in round 2 of 3",
    ]


@pytest.mark.parametrize(("steps", "rounds"), [(1200, 1), (1201, 3), (5, 4), (7, 3)])
def test_no_step_of_a_training_is_lost(steps: int, rounds: int) -> None:
    parts = [part for part in HEAL.model_copy(update={"steps": steps, "accumulate": 2}).spread(rounds, bert_shape()) if part]
    assert sum(part.steps for part in parts) == steps
    assert [part.first_batch for part in parts] == [2 * sum(part.steps for part in parts[:number]) for number in range(rounds)]
    assert parts[-1].steps == max(part.steps for part in parts)
    assert all(
        part.model_copy(update={"steps": steps, "first_batch": 0}).model_dump()
        == HEAL.model_dump() | {"steps": steps, "accumulate": 2}
        for part in parts
    )


def test_a_later_round_starts_where_the_one_before_ended() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, size=257)
    small = HEAL.model_copy(update={"steps": 40, "batch": 8, "accumulate": 2})
    order = batches_from(lengths, small, 0)
    for part in small.spread(3, bert_shape()):
        assert part is not None
        own = batches_from(lengths, part, part.first_batch)
        for _ in range(part.steps * part.accumulate):
            assert np.array_equal(next(own), next(order))


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [80, 81, 1536, 3072, 14336])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.625, 0.77, 0.99])
def test_the_last_round_ends_at_the_sizes_of_one_step(rounds: int, channels: int, share: float) -> None:
    shape, step = bert_shape(2, channels), Width(channels=share, heads=share)
    if not step.fits(shape):
        with pytest.raises(ValueError, match=r"leaves none|keeps all"):
            step.spread(rounds, shape)
        return
    after = shape
    for part in step.spread(rounds, shape):
        before, after = after, after if part is None else part.estimate(after).after
        assert part is None or sizes(before) != sizes(after)
    assert sizes(after) == sizes(step.estimate(shape).after)
    assert after.config == step.estimate(shape).after.config


@pytest.mark.parametrize("blocks", range(2, 33))
@pytest.mark.parametrize("rounds", [1, 3, 4])
def test_as_many_blocks_go_as_in_one_step(blocks: int, rounds: int) -> None:
    shape, step = bert_shape(blocks, 8, 1), Depth(keep=0.4)
    parts = step.spread(rounds, shape)
    assert len(parts) == rounds
    counts, after = [], shape
    for part in parts:
        before, after = after.blocks, after if part is None else part.estimate(after).after
        counts.append(before - after.blocks)
    assert after.blocks == step.estimate(shape).after.blocks
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1


def test_blocks_of_different_sizes_each_end_at_their_own() -> None:
    shape = bert_shape(3, (64, 128, 512))
    step = Width(channels=0.5, heads=0.5, overrides={"*layer.1": Shares(channels=0.25), "*layer.2": Shares(heads=1.0)})
    parts = step.spread(3, shape)
    assert sizes(ends([part for part in parts if part], shape)) == sizes(step.estimate(shape).after)
    heads = [[one.heads for one in sizes_of(ends([part for part in parts[:number] if part], shape))] for number in range(4)]
    assert heads == [[12, 12, 12], [10, 10, 12], [8, 8, 12], [6, 6, 12]]


def test_a_round_has_no_step_for_what_is_done() -> None:
    steps = steps_for(group(Depth(keep=11 / 12), Width(heads=0.5)), bert_shape())
    assert [step.method for step in steps] == ["depth", "width", "distill", "width", "distill", "width", "distill"]
    with pytest.raises(
        UserError, match=r"recipe recipe: steps\.0\.rounds: 3 rounds are more than there is to prune of tiny"
    ) as caught:
        steps_for(group(Depth(keep=10 / 12)), bert_shape())
    assert caught.value.hint == "take 2"


def test_one_round_is_the_steps_themselves() -> None:
    made = steps_for(group(Depth(keep=0.5), Width(channels=0.5), rounds=1), bert_shape())
    assert made == (Depth(keep=0.5), Width(channels=0.5), HEAL)


def test_steps_around_the_rounds_stay_and_are_counted(tmp_path: Path) -> None:
    raw = {"steps": [{"method": "depth", "keep": 0.5}, GROUP | {"rounds": 2}, {"method": "rtn", "bits": 8}]}
    placed = placed_steps(parse_recipe(raw), bert_shape())
    assert [step.method for _, step in placed] == ["depth", "depth", "width", "distill", "depth", "width", "distill", "rtn"]
    # The group's half is of the six blocks that are left.
    assert [step.keep for _, step in placed if isinstance(step, Depth)] == [0.5, 4 / 6, 3 / 4]
    assert placed[-1][0] == "steps.2"
    folded = steps_for(parse_recipe(raw), find_shape("nvidia/NV-Embed-v2"))
    assert [step.method for step in folded].index("fold") == 2


GROUP: dict[str, Any] = {
    "rounds": 3,
    "steps": [
        {"method": "depth", "keep": 0.5},
        {"method": "width", "channels": 0.5},
        {"method": "distill", "texts": "t.jsonl", "steps": 1200},
    ],
}


def test_a_group_survives_a_round_trip_and_is_in_sweeps(tmp_path: Path) -> None:
    recipe = parse_recipe({"steps": [GROUP]})
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert [step.method for step in recipe.methods] == ["depth", "width", "distill"]
    (tmp_path / "r.yaml").write_text(json.dumps({"steps": [GROUP]}))
    sweep = tmp_path / "s.yaml"
    sweep.write_text("recipes: [r.yaml]\nvalues: {steps.0.rounds: [1, 3], steps.0.steps.0.keep: [0.25, 0.5]}\n")
    points = read_sweep(sweep).spaces[0].grid()
    found = [(step.rounds, step.steps[0].keep) for point in points for step in point.recipe.steps if isinstance(step, Rounds)]  # type: ignore[attr-defined]
    assert found == [(1, 0.25), (1, 0.5), (3, 0.25), (3, 0.5)]
    sweep.write_text("recipes: [r.yaml]\nvalues: {steps.0.rounds: [0]}\n")
    with pytest.raises(UserError, match=r"values\.steps\.0\.rounds: with 0 in r: steps\.0\.rounds: input should be greater"):
        read_sweep(sweep)


def test_a_plan_shows_every_round(tmp_path: Path) -> None:
    plan = make_plan(parse_recipe({"steps": [GROUP]}), find_shape("nvidia/NV-Embed-v2"), tmp_path)
    assert [note.partition(":")[0] for note in plan.steps if "fold" not in note] == ["depth", "width", "distill"] * 3
    assert list(plan.gpus) == [f"distill in round {number} of 3" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rounds: 3\n    steps:\n      - {method: depth, kep: 1}",
            "line 4: steps.0.steps.0.kep: unknown key 'kep'; did you mean 'keep'?",
        ),
        (
            "rounds: 3\n    steps: [{method: rtn}, {method: distill, texts: t}]",
            "steps.0.steps.0.method: rtn is not done in rounds; put",
        ),
        ("rounds: 3\n    steps: [{method: dpth}]", "steps.0.steps.0.method: unknown method 'dpth'; did you mean 'depth'?"),
        (
            "rounds: 2\n    steps:\n      - {method: depth, drop: [1, 2]}\n      - {method: distill, texts: t}",
            "line 4: steps.0.steps.0.drop: names blocks, and each round chooses its own; give `keep`",
        ),
        (
            "rounds: 2\n    steps: [{method: depth, keep: 0.5, what: mlp}, {method: distill, texts: t}]",
            "steps.0.steps.0.what: mlp is not dropped in rounds",
        ),
        (
            "rounds: 3\n    steps: [{method: depth, keep: 0.5}, {method: distill, texts: t, steps: 3}]",
            "steps.0.steps.1.steps: 3 are too few for 3 rounds, the last of which gets two shares; give 4",
        ),
        (
            "rounds: 3\n    steps: [{method: depth, keep: 0.5}, {method: distill, texts: t, student: nano}]",
            "steps.0.steps.1.student: is another model than the one that the rounds prune",
        ),
        ("rounds: 3\n    steps: [{method: depth, keep: 0.5}]", "steps.0.steps.0: each round ends with the one step that heals"),
        ("rounds: 3\n    steps: [{method: distill, texts: t}]", "steps.0.steps: prunes nothing; put depth or width before"),
        (
            "rounds: 3\n    steps: [{method: distill, texts: t}, {method: depth, keep: 0.5}, {method: distill, texts: t}]",
            "steps.0.steps.0: each round ends with the one step that heals; put distill last",
        ),
        (
            "rounds: 3\n    steps: [{method: depth, keep: 0.5}, {method: depth, keep: 0.5}, {method: distill, texts: t}]",
            "steps.0.steps.1: depth is there already",
        ),
        (
            "rounds: 3\n    steps: [{method: width, heads: 0.5}, {method: depth, keep: 0.5}, {method: distill, texts: t}]",
            "steps.0.steps.1: depth changes the model as a whole; put it before width",
        ),
        (
            "rounds: 3\n    steps:\n      - {method: depth, keep: 0.5}\n      - method: width\n"
            "        overrides: {'*.1': {heads: 0.5}}\n      - {method: distill, texts: t}",
            "line 6: steps.0.steps.1.overrides: names blocks, which depth renumbers in each round",
        ),
        ("rounds: 3\n    steps: []", "steps.0.steps: prunes nothing"),
        ("rounds: 3", "steps.0.steps: must be a list of steps"),
        ("method: rounds\n    steps: [{method: depth, keep: 0.5}, {method: distill, texts: t}]", "steps.0.rounds: field required"),
        ("rounds: 3\n    steps: [{rounds: 2, steps: []}]", "steps.0.steps.0: rounds in rounds are not taken"),
        (
            "rounds: 3\n    step: 1\n    steps: [{method: depth, keep: 0.5}, {method: distill, texts: t}]",
            "line 3: steps.0.step: unknown key 'step'; did you mean 'steps'?",
        ),
    ],
)
def test_faults_in_a_group_are_named_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(f"steps:\n  - {text}\n")
    with pytest.raises(UserError) as caught:
        read_recipe(tmp_path / "r.yaml")
    assert message in caught.value.message


def test_what_does_not_fit_the_model_names_the_step_of_the_group() -> None:
    with pytest.raises(UserError, match=r"recipe recipe: steps\.0\.steps\.0 \(depth\): `keep: 0.01` leaves none of 12 blocks"):
        steps_for(group(Depth(keep=0.01)), bert_shape())
    with pytest.raises(UserError, match=r"steps\.0\.steps\.1 \(width\): blocks of tiny have different sizes"):
        steps_for(group(Depth(keep=0.5), Width(channels=0.3)), bert_shape(channels=[3072] * 11 + [1000]))
    with pytest.raises(ValueError, match=r"steps\.0\.drop: names blocks"):
        Rounds(rounds=2, steps=(Depth(drop=(1,)), HEAL))


def test_width_is_used_twice_only_around_a_step_that_changes_the_whole() -> None:
    with pytest.raises(UserError, match="width can be used once before"):
        parse_recipe({"steps": [{"method": "width", "heads": 0.5}] * 2})
    with pytest.raises(UserError, match="width can be used once before"):
        parse_recipe({"steps": [{"method": "width", "heads": 0.5}, GROUP | {"steps": GROUP["steps"][1:]}]})
    parse_recipe({"steps": [GROUP, {"method": "width", "heads": 0.5}]})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in suite_texts()[:200]))
    return path


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    bert: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heal = Distill(method="distill", texts=str(texts), held_out=20, batch=8, steps=9, every=2, precision="no", max_tokens=32)
    pruned = (Depth(keep=0.5), Width(channels=0.5, heads=0.5))
    steps = steps_for(Recipe(steps=(Rounds(rounds=2, steps=(*pruned, heal)),)), folder_of(bert).shape_to_compress)
    assert [step.method for step in steps] == ["depth", "width", "distill", "width", "distill"]
    starts: list[int] = []

    def noted(lengths: np.ndarray, settings: Distill, start: int) -> Iterator[np.ndarray]:
        starts.append(start)
        return batches_from(lengths, settings, start)

    with monkeypatch.context() as patch:
        patch.setattr(training, "batches_from", noted)
        compress_to(bert, tmp_path / "whole", *steps)
    assert starts == [0, 3]
    compress_to(bert, tmp_path / "at-once", *pruned)
    assert stored_shapes(tmp_path / "whole") == stored_shapes(tmp_path / "at-once")

    keep = Checkpoints.keep

    def killed(self: Checkpoints, curve: list[dict[str, float]]) -> None:
        keep(self, curve)
        if curve[-1]["step"] == 4:  # the first round has three
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "keep", killed)
        with pytest.raises(KeyboardInterrupt):
            compress_to(bert, tmp_path / "killed", *steps)
    compress_to(bert, tmp_path / "killed", *steps)
    # What all rounds dropped is said once.
    info = folder_of(tmp_path / "whole").variant
    assert info is not None
    assert info.weights == "float16 less 1 block 0.5 of heads 0.5 of channels"
    for name in ("model.safetensors", "config.json", "variant.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
