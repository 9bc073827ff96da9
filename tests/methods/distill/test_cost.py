"""What a plan says about memory and operations of a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.methods.distill.method import Distill
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.gptq import GPTQ
from compress.models.source import find_shape
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe_file import parse_recipe


def test_a_plan_says_what_each_of_several_gpus_would_take() -> None:
    recipe = parse_recipe(
        {"steps": [{"method": "distill", "texts": "texts.txt", "steps": 1000, "batch": 64, "learning_rate": 1e-4}]}
    )
    shape = find_shape("nvidia/NV-Embed-v2")
    step = recipe.steps[0]
    assert isinstance(step, Distill)
    whole = step.estimate(shape)
    sharded, low = (step.model_copy(update=change).estimate(shape) for change in ({"sharded": True}, {"lora": 16}))
    assert whole.gpus[8][0] > 16 * shape.parameters  # weights, gradients and two moments, on each
    assert 16 * shape.parameters / 8 < sharded.gpus[8][0] < 0.2 * whole.gpus[8][0]
    assert sharded.gpus[1] == whole.gpus[1]
    assert 4 * shape.parameters < low.gpus[1][0] < 0.5 * whole.gpus[1][0]
    assert 0.25 < whole.gpus[4][1] / whole.gpus[1][1] < 0.5  # the teacher is not shared
    assert "8: " in describe(make_plan(recipe, shape, Path.cwd()))


def test_a_plan_counts_weights_in_integers_as_what_they_stand_for() -> None:
    shape = find_shape("nvidia/NV-Embed-v2")
    rounded = Embeddings(bits=4, group_size=64).estimate(GPTQ(bits=3, group_size=64).estimate(shape).after).after
    assert rounded.flops_per_token(64) == pytest.approx(shape.flops_per_token(64), rel=1e-9)
    learned, frozen = (
        Distill(texts="texts.txt", steps=100, batch=64, learning_rate=1e-4, integers=integers) for integers in ("trained", "frozen")
    )
    plain = learned.model_copy(update={"integers": "frozen"}).estimate(shape)
    assert learned.estimate(rounded).gpus[1] == pytest.approx(plain.gpus[1], rel=0.03)  # scales are counted beside
    assert frozen.estimate(rounded).gpus[1][0] < 0.5 * plain.gpus[1][0]
    assert frozen.estimate(rounded).gpus[1][1] == pytest.approx(plain.gpus[1][1], rel=0.03)
