"""A shape's numbers, whatever names an architecture gives them in its config."""

from __future__ import annotations

import subprocess
import sys

import pytest
from transformers import DistilBertConfig, GPT2Config

from compress.common.errors import UserError
from compress.models.shape import ModelShape


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "distilbert", "dim": 48, "n_layers": 2, "n_heads": 4},
        {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4},
        {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"model_type": "t5", "d_model": 48, "num_layers": 2, "num_heads": 4},
        {"model_type": "some-vlm", "text_config": {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}},
    ],
    ids=lambda config: config["model_type"],
)
def test_settings_are_found_under_the_architecture_s_own_names(config: dict[str, object]) -> None:
    shape = ModelShape("it", {}, config)
    assert (shape.hidden_size, shape.blocks, shape.head_width) == (48, 2, 12)


@pytest.mark.parametrize("config", [DistilBertConfig(dim=48, n_layers=2, n_heads=4), GPT2Config(n_embd=48, n_layer=2, n_head=4)])
def test_configs_that_transformers_writes(config: DistilBertConfig | GPT2Config) -> None:
    shape = ModelShape("it", {}, config.to_dict())
    assert (shape.hidden_size, shape.blocks, shape.head_width) == (48, 2, 12)


@pytest.mark.parametrize("kind", ["bert", "no-such-architecture", None])
def test_a_setting_that_is_nowhere_is_named(kind: str | None) -> None:
    with pytest.raises(UserError, match=r"it: config\.json lacks 'num_hidden_layers'"):
        _ = ModelShape("it", {}, {"model_type": kind, "hidden_size": 48}).blocks


def test_usual_names_do_not_import_transformers() -> None:
    config = {"model_type": "bert", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    lines = [
        "import sys",
        "from compress.models.shape import ModelShape",
        f"shape = ModelShape('it', {{}}, {config!r})",
        "assert (shape.hidden_size, shape.blocks, shape.head_width) == (48, 2, 12)",
        "assert not {'transformers', 'torch'} & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
