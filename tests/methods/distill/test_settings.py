"""The keys of `distill`: what a recipe may say, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from compress.common.errors import UserError
from compress.methods.distill.method import Distill
from compress.methods.distill.objectives import OBJECTIVES
from compress.methods.distill.settings import OBJECTIVE_NAMES
from compress.methods.distill.student import Student
from compress.pipeline.apply import stages_of
from compress.pipeline.recipe_file import parse_recipe


def test_the_recipe_knows_the_objectives_that_there_are() -> None:
    assert tuple(OBJECTIVES) == OBJECTIVE_NAMES


def test_wrong_keys_are_named(texts: Path) -> None:
    with pytest.raises(UserError, match="objective 'cosin' is not known"):
        parse_recipe({"steps": [{"method": "distill", "texts": str(texts), "objectives": {"cosin": 1.0}}]})
    with pytest.raises(ValidationError, match="leaves less than one batch"):
        Distill(texts=str(texts), count=1000, held_out=1000)
    with pytest.raises(ValidationError, match="have to divide"):
        Student(width=384, heads=7)


def test_only_what_may_comes_after_single_layers(texts: Path) -> None:
    distill = {"method": "distill", "texts": str(texts)}
    steps = parse_recipe({"steps": [{"method": "depth", "keep": 0.5}, {"method": "rtn"}, distill, {"method": "gptq"}]}).steps
    assert [[step.method for step in stage] for stage in stages_of(steps)] == [["depth", "rtn"], ["distill", "gptq"]]
    with pytest.raises(UserError, match="put it before rtn"):
        parse_recipe({"steps": [{"method": "rtn"}, {"method": "depth", "keep": 0.5}]})
