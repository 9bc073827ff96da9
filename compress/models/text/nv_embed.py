"""How NV-Embed takes texts, and how its `config.json` is read. No torch here.

Lee et al. 2024, "NV-Embed", arXiv 2405.17428. The network is in `compress.models.network.nv_embed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from compress.common.errors import UserError
from compress.common.inputs import read_json
from compress.models.text.spec import EmbedderSpec, Pooling

MODEL_TYPE = "nvembed"
EOS = "</s>"
PREFIX = "Instruct: {instruction}\nQuery: "
# Defaults of the original code. The published config.json gives only the type of the latent-attention head.
LATENT_DEFAULTS = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "output_normalize": True,
}
MISTRAL_POSITIONS = 131_072
"""Number of positions of a Mistral whose config does not say (transformers' default)."""


def latent_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the latent-attention head, with the original code's defaults filled in."""
    own: Mapping[str, Any] = config.get("latent_attention_config", {})
    return {**LATENT_DEFAULTS, **own}


def backbone_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the backbone's settings as keyword arguments of transformers' MistralConfig."""
    skipped = ("model_type", "architectures", "_name_or_path")
    text = {key: value for key, value in config["text_config"].items() if key not in skipped}
    # The file sets a sliding window, but the original code does not apply it.
    return {**text, "sliding_window": None, "use_cache": False}


def read_config(config: Mapping[str, Any]) -> Any:
    """Return the backbone's config for transformers, without a causal mask; `config`: the content of `config.json`."""
    from transformers import MistralConfig

    backbone = MistralConfig(**backbone_settings(config))
    backbone.is_causal = False
    return backbone


def read_spec(folder: Path) -> EmbedderSpec:
    """Return how NV-Embed takes texts: EOS appended as text, instructions not pooled, an instruction for each MTEB task.

    NV-Embed-v1 has the same config and tensor names, so it loads too, but its weights have not been tested.

    Raises:
        UserError: the config has a setting that neither version of the model uses.
    """
    config = read_json(folder / "config.json")
    for key, only in (("mask_type", "b"), ("padding_side", "right")):
        if config.get(key, only) != only:
            raise UserError(f"{folder / 'config.json'}: {key} {config[key]!r} is not supported, only {only!r}")
    settings = folder / "sentence_bert_config.json"
    longest = read_json(settings).get("max_seq_length") if settings.exists() else None
    positions = int(config["text_config"].get("max_position_embeddings", MISTRAL_POSITIONS))
    return EmbedderSpec(
        pooling=Pooling.MEAN,
        pool_prompt=not config.get("is_mask_instruction", True),
        prompt_specials=False,
        suffix=EOS if config.get("add_eos", True) else "",
        normalize=bool(latent_settings(config)["output_normalize"]),
        max_length=min(longest or positions, positions),
        prompts=instruction_prompts(),
    )


def instruction_prompts() -> dict[str, str]:
    """Return the prompt for each MTEB task, by task name or by `<task>-query` and `<task>-document`.

    The instructions come from the model's own `instructions.json`; tasks that are missing there get mteb's default. Documents in
    asymmetric retrieval get an explicitly empty prompt.
    """
    listing = json.loads((resources.files("compress.data") / "nv_embed_instructions.json").read_text(encoding="utf-8"))
    prompts = {}
    for task, instructions in listing["tasks"].items():
        for role, instruction in instructions.items():
            name = task if role == "text" else f"{task}-{role}"
            prompts[name] = PREFIX.format(instruction=instruction) if instruction else ""
    return prompts
