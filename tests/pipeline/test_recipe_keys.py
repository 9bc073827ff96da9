"""Keys of a recipe that would have no effect, and recipes that would hang their reader, are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compress
from compress.common.errors import UserError
from compress.models.source import find, find_shape
from compress.pipeline.plan import make_plan
from compress.pipeline.recipe_file import parse_recipe, read_recipe


def bomb(levels: int, opening: str, closing: str) -> str:
    lines = [f"a0: &a0 {opening}x{closing}"]
    for level in range(1, levels):
        inside = ", ".join(f"{f'k{n}: ' if opening == '{' else ''}*a{level - 1}" for n in range(9))
        lines.append(f"a{level}: &a{level} {opening}{inside}{closing}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9, "[", "]"), "with its aliases the file has more than 100,000 values"),
        (bomb(9, "{", "}"), "with its aliases the file has more than 100,000 values"),
        ("steps: &a [*a]\n", "line 1"),
        ("evaluate: &a {prompts: *a}\n", "line 1"),
        ("\nsteps: " + "[" * 2_000 + "]" * 2_000, "line 2: nested more than 32 levels deep"),
        ("- " * 3_000 + "x\n", "nested too deeply for a recipe"),
        (f"seed: 1\nmargin: 1{'0' * 5_000}\n", "line 2: a number has too many digits"),
        ("~: 1\n", "line 1: None: unknown key"),
        ("seed: 1\n1: 1\n", "line 2: 1: unknown key"),
        ("description: " + "d" * 2**20, "larger than 524,288 bytes"),
    ],
)
def test_recipes_that_would_hang(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"r\.yaml.*{message}"):
        read_recipe(tmp_path / "r.yaml")


def test_brackets_in_strings_and_comments_nest_nothing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"description: '{'[' * 40}'  # {'[' * 40}\nsteps: []\n")
    assert read_recipe(tmp_path / "r.yaml").description == "[" * 40


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero: a device, not a regular file"):
        read_recipe("/dev/zero")
    (tmp_path / "r.yaml").symlink_to("r.yaml")
    with pytest.raises(UserError, match=r"r\.yaml: cannot be read"):
        read_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gates": {"retained": 98}}, "gates.retained: input should be less than or equal to 1"),
        ({"gates": {"size_ratio": float("inf")}}, "gates.size_ratio: input should be"),
        ({"gates": {"speedup": float("inf")}}, "gates.speedup: input should be a finite number"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"measure": {"batches": (1, 2)}}, "`batches` has no effect without `lengths`"),
        ({"measure": {"count": 10**12}}, "measure.count: input should be less than"),
        ({"measure": {"threads": 10**9}}, "measure.threads: input should be less than"),
        ({"steps": ({"method": "depth", "drop": ()},)}, "`drop` names no block"),
        ({"steps": ({"method": "rtn", "overrides": {"*query": {}}},)}, "overrides '.query' sets nothing"),
        ({"steps": ({"method": "rtn", "bits": "4"},)}, "'4' is not allowed here; write 4 without quotes"),
        ({"steps": ({"method": "smoothquant", "range": "minmax"},)}, "`range` has no effect"),
        (
            {"steps": ({"method": "smoothquant", "activations": "static_per_tensor", "percentile": 99.0},)},
            "`percentile` has no effect without",
        ),
        ({"steps": ({"method": "distill", "texts": "t", "prompted": 0.5},)}, "have no effect without `prompts`"),
        ({"steps": ({"method": "distill", "texts": "t", "matryoshka": (0,)},)}, "matryoshka.0: input should be greater"),
        ({"steps": ({"method": "distill", "texts": "t", "matryoshka": (8, 8)},)}, "twice"),
        ({"steps": ({"method": "distill", "texts": "t", "objectives": {"cosine": float("nan")}},)}, "objectives.cosine: .*finite"),
    ],
)
def test_keys_without_an_effect(content: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe(content)
    assert re.search(message, caught.value.message), caught.value.message


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (
            {"method": "rtn", "skip": ("*q_proj",), "overrides": {"*q_proj": {"bits": 4}}},
            r"overrides '\*q_proj' has no effect: `skip`",
        ),
        ({"method": "depth", "keep": 0.95}, r"`keep: 0.95` of 4 blocks drops none"),
        ({"method": "width", "channels": 0.999}, "keeps all of its heads and channels"),
    ],
)
def test_steps_without_an_effect_on_the_model(step: dict[str, object], message: str) -> None:
    shape = find_shape("nano")
    assert shape.blocks == 4
    with pytest.raises(UserError, match=message):
        make_plan(parse_recipe({"steps": (step,)}), shape, Path("results"))


def test_matryoshka_beyond_the_dimension_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("one text\n")
    nano, width = find_shape("nano", to_compress=True), find("nano").dimension
    step = {"method": "distill", "texts": str(tmp_path / "texts.txt")}
    make_plan(parse_recipe({"steps": ({**step, "matryoshka": (width // 2,)},)}), nano, tmp_path)
    beyond = parse_recipe({"steps": ({"method": "rtn"}, {**step, "matryoshka": (width // 2, width)})})
    message = f"steps.1: `matryoshka: {width}` has no effect: the student's vectors have {width} dimensions"
    with pytest.raises(UserError, match=message):
        make_plan(beyond, nano, tmp_path)
    with pytest.raises(UserError, match=message):
        compress.run(beyond.model_copy(update={"model": "nano"}), output=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
