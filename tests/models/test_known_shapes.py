"""Public models that are known by name: their tensors, their published parameter counts, and what a recipe makes of them."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from compress.models.random_weights import RandomSpec, random_checkpoint, random_shape
from compress.models.shape import known_config, known_shape
from compress.models.source import find, find_shape
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import parse_recipe

NAMES = [
    "nvidia/Nemotron-3-Embed-8B-BF16",
    "Qwen/Qwen3-Embedding-8B",
    "google/embeddinggemma-300m",
    "BAAI/bge-m3",
    "jinaai/jina-embeddings-v3",
    "nomic-ai/nomic-embed-text-v1.5",
]
# What the checkpoints hold and the shapes do not list, because no network of transformers has it or no embedding uses it.
NOT_LISTED = {
    "google/embeddinggemma-300m": "Dense",
    "BAAI/bge-m3": "pooler",
    "jinaai/jina-embeddings-v3": "adapters",
}


def published(name: str) -> dict[str, Any]:
    file = resources.files("compress.data") / "shapes" / f"{name.replace('/', '--')}.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["published"]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_are_those_that_were_published(name: str) -> None:
    shape, source = known_shape(name), published(name)
    assert shape is not None
    left_out = source["left_out"]
    assert shape.parameters + sum(left_out.values()) == pytest.approx(source["parameters"], rel=0.01)
    assert source["source"].endswith(name)
    # All but bge-m3's, which is published in whole millions, agree to the parameter.
    assert (shape.parameters + sum(left_out.values()) == source["parameters"]) == (name != "BAAI/bge-m3")
    assert bool(left_out) == (name in NOT_LISTED)
    assert all(any(NOT_LISTED[name] in what for what in left_out) for _ in left_out)


@pytest.mark.parametrize("name", NAMES)
def test_the_tensors_are_those_of_the_network(name: str) -> None:
    built, listed = random_shape(RandomSpec(name, {}), None), known_shape(name)
    assert listed is not None
    assert {key: info.shape for key, info in built.tensors.items()} == {key: info.shape for key, info in listed.tensors.items()}
    assert built.parameters == listed.parameters


def recipe(*steps: dict[str, Any]) -> Recipe:
    return parse_recipe({"name": "r", "steps": list(steps), "measure": {"what": []}, "evaluate": {"tasks": ["MiniSTS"]}})


def smaller(name: str) -> dict[str, Any]:
    """Fields of the config that make a network of two blocks."""
    config = known_config(name)
    assert config is not None
    fields = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 80, "vocab_size": 600}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 66}
    fields["layer_types"] = ["sliding_attention", "full_attention"]
    return {key: value for key, value in fields.items() if key in config}


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_of_int8_is_kept(name: str, tmp_path: Any) -> None:
    """What is planned for the known shape runs on a small random model of the same architecture, layer for layer."""
    shape = find_shape(name)
    text = describe(make_plan(recipe({"method": "rtn"}), shape, tmp_path))
    layers = len(shape.block_linears)
    assert f"rtn: {layers} linear layers" in text
    assert find_shape(f"random:{name}").tensors == shape.tensors
    from compress.pipeline.run import run

    checkpoint = random_checkpoint(RandomSpec(name, smaller(name)), None)
    run(recipe({"method": "rtn"}), model=str(checkpoint), output=tmp_path / "runs", device="cpu", compress_only=True)
    made = find(str(next((tmp_path / "runs").iterdir())))
    assert len(made.compressed.quantized) == 2 * layers // shape.blocks
