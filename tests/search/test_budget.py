"""Searches of tiny models: a recipe that anyone can read, kept bounds, the same seed and a kill at any moment end in the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_support import FEW

from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.methods.prune.width import Width
from compress.methods.quantize.gptq import GPTQ
from compress.models.source import find
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe_file import read_recipe
from compress.search.assemble import patterns, steps_of
from compress.search.budget import Bounds, Found, SearchOptions, search, write_found
from compress.search.items import items_of
from compress.search.knapsack import Problem, total
from compress.search.options import size_of
from compress.search.prediction import agreement, cosine_loss, tangent
from compress.search.sensitivity import Subject

FAST = SearchOptions(scoring=FEW, trials=2, candidates=2, points=4)


KILLED_AT = (2, 7, 11, 16, 23)
"""Numbers of the results before whose keeping a search is killed: in the scores, in trials, among the solutions."""


def found_for(model: Path, size: float = 40_000) -> Found:
    return search(str(model), Bounds(max_bytes=size), FAST, say=lambda _: None)


def test_a_recipe_is_found_that_keeps_the_size_and_reads_like_any_other(bert: Path, tmp_path: Path) -> None:
    plain = find(str(bert)).shape_to_compress.as_stored().file_bytes
    bound = 0.55 * plain
    found = found_for(bert, bound)
    write_found(found, tmp_path / "small.yaml")
    recipe = read_recipe(tmp_path / "small.yaml")
    assert recipe.steps == found.recipe.steps
    plan = make_plan(recipe, find(str(bert)).shape_to_compress, tmp_path)
    assert plan.variant_bytes <= bound
    assert plan.variant_bytes == found.why["bytes"]
    assert (tmp_path / "small.search.json").exists()
    assert found.why["front"]


def test_a_search_that_is_killed_ends_in_the_same_recipe(
    bert: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    size = 0.55 * find(str(bert)).shape_to_compress.as_stored().file_bytes
    whole = found_for(bert, size)
    put, done = Journal.put, [0]
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path_factory.mktemp("another")))

    def killed(self: Journal, key: str, value: dict[str, object]) -> None:
        done[0] += 1
        if done[0] in KILLED_AT:  # before the result is kept
            raise KeyboardInterrupt
        put(self, key, value)

    monkeypatch.setattr(Journal, "put", killed)
    kills = 0
    while True:
        try:
            again = found_for(bert, size)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == len(KILLED_AT)
    assert again.recipe == whole.recipe
    assert again.why == whole.why


def test_bounds_that_nothing_keeps_are_refused(bert: Path) -> None:
    with pytest.raises(UserError, match="no bound is given"):
        search(str(bert), Bounds(), FAST, say=lambda _: None)
    with pytest.raises(UserError, match="what no choice is about takes"):
        found_for(bert, 100)


def test_an_assignment_becomes_few_patterns(bert: Path) -> None:
    subject = Subject(str(bert), replace(FEW, choices=("int8", "int4", "int3", "w8a8", "dropped")))
    chosen = {group.name: "int4" for group in subject.choices if group.kind != "block"}
    (gptq, embeddings) = steps_of(chosen, subject.choices, subject.shape)
    assert isinstance(gptq, GPTQ)
    assert (gptq.bits, gptq.skip, gptq.overrides) == (4, (), {})
    assert embeddings.method == "embeddings"
    chosen |= {"1.down": "int3", "0.qkv": "w8a8", "1.o": "float16"}
    rtn, gptq, _ = steps_of(chosen, subject.choices, subject.shape)
    assert isinstance(gptq, GPTQ)
    assert {pattern: override.bits for pattern, override in gptq.overrides.items()} == {"*layer.1.output.*": 3}
    assert gptq.skip == ("*layer.1.attention.output.*",)
    estimate = gptq.estimate(rtn.estimate(subject.shape).after)
    assert {layer.bits for layer in estimate.quantized.values()} == {3, 4}
    depth, *rest = steps_of({**chosen, "0.block": "dropped"}, subject.choices, subject.shape)
    assert depth.method == "depth"
    assert all(step.method != "rtn" for step in rest)
    last = rest[0]
    assert isinstance(last, GPTQ)
    assert last.skip == ("*.attention.output.*",)  # of the one block that is left
    assert {pattern: override.bits for pattern, override in last.overrides.items()} == {"*layer.0.output.*": 3}


MIXED = replace(FEW, choices=("int8", "int4", "w8a8", "sparse-50", "dropped", "channels-50", "heads-50"))


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_what_items_take_is_what_the_steps_make(make_model, kind: str) -> None:
    subject = Subject(str(make_model(kind)), MIXED)
    shape, choices = subject.shape, subject.choices
    problem = Problem(items_of(choices, shape, "torch", None))
    fixed = shape.as_stored().file_bytes - sum(
        item.costs["bytes"] for item in problem.items if item.choice == "float16" and (not item.given or "float16" in item.given[1])
    )
    generator = np.random.default_rng(0)
    seen: set[str] = set()
    for _ in range(40):
        chosen = {group.name: str(generator.choice([choice.name for choice in offered])) for group, offered in choices.items()}
        if sum(choice == "dropped" for choice in chosen.values()) == 2:
            continue
        seen |= set(chosen.values())
        after = shape
        for step in steps_of(chosen, choices, shape):
            after = step.estimate(after).after
        assert total(problem, chosen, "bytes") + fixed == after.file_bytes, chosen
    assert seen == {"float16", *MIXED.choices}


def test_blocks_that_are_narrower_become_one_step(bert: Path) -> None:
    subject = Subject(str(bert), MIXED)
    chosen = {"0.block": "channels-50", "1.block": "heads-50", "1.up": "int4"}
    width, _ = steps_of(chosen, subject.choices, subject.shape)
    assert isinstance(width, Width)
    assert width.shares_of("encoder.layer.0") == {"channels": 0.5, "heads": 1.0}
    assert width.shares_of("encoder.layer.1") == {"channels": 1.0, "heads": 0.5}
    assert list(width.overrides) == ["*layer.0", "*layer.1"]
    (everywhere,) = steps_of({"0.block": "heads-50", "1.block": "heads-50"}, subject.choices, subject.shape)
    assert isinstance(everywhere, Width)
    assert (everywhere.heads, everywhere.overrides) == (0.5, {})
    _, width = steps_of({"0.block": "dropped", "1.block": "channels-50"}, subject.choices, subject.shape)
    assert isinstance(width, Width)
    assert width.channels == 0.5  # of the one block that is left


def test_a_search_narrows_blocks_where_bits_alone_do_not_keep_the_bound(bert: Path, tmp_path: Path) -> None:
    options = replace(FAST, scoring=replace(FEW, choices=("int8", "channels-50", "heads-50")), candidates=1)
    subject = Subject(str(bert), options.scoring)
    shape = find(str(bert)).shape_to_compress
    plain = shape.as_stored().file_bytes
    whole = {group.name: "int8" for group in subject.choices if group.kind != "block"}
    for step in steps_of(whole, subject.choices, subject.shape):
        shape = step.estimate(shape).after
    bound = shape.file_bytes - 0.1 * shape.bytes  # the names in the file stay as they are
    found = search(str(bert), Bounds(max_bytes=bound), options, say=lambda _: None)
    write_found(found, tmp_path / "small.yaml")
    recipe = read_recipe(tmp_path / "small.yaml")
    assert recipe.steps == found.recipe.steps
    assert recipe.steps[0].method == "width"
    plan = make_plan(recipe, find(str(bert)).shape_to_compress, tmp_path)
    assert plan.variant_bytes == found.why["bytes"] <= bound < plain


def test_patterns_match_what_is_wanted_and_nothing_else() -> None:
    there = [f"encoder.layer.{block}.{name}" for block in range(12) for name in ("attention.output.dense", "output.dense")]
    assert patterns([name for name in there if ".1." in name], there) == ("*layer.1.*",)
    assert patterns(["encoder.layer.1.output.dense"], there) == ("*layer.1.output.*",)


def test_sizes_are_read() -> None:
    assert size_of("12MB") == 12e6
    assert size_of("1.5 gb") == 1.5e9
    for wrong in ("12 parsecs", "-1MB", "0"):
        with pytest.raises(UserError, match="is not a size"):
            size_of(wrong)


def test_predictions_invert_measurements() -> None:
    assert cosine_loss(tangent(0.3)) == pytest.approx(0.3)
    assert cosine_loss(1e9) < 1
    exact = agreement([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert (exact.slope, exact.r2_fitted, exact.rank) == pytest.approx((2, 1, 1))
    assert exact.r2 < 0
