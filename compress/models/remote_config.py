"""The `config.json` of remote code whose network transformers computes itself, under the names of transformers. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.common.errors import UserError, nearest


@dataclass(frozen=True)
class Renamed:
    """How the config of remote code says what transformers' own config of the architecture says."""

    names: Mapping[str, str]
    """The names of transformers' settings, by those of the remote code."""
    only: Mapping[str, tuple[Any, ...]]
    """Settings that transformers has no choice for, with the values that mean what it computes."""
    unused: frozenset[str]
    """Settings that do not change a vector."""


RENAMED_SETTINGS: Mapping[str, Renamed] = {
    # nomic-ai/nomic-bert-2048's configuration_hf_nomic_bert.py, a GPT-2 config with additions.
    "nomic_bert": Renamed(
        names={
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
            "n_inner": "intermediate_size",
            "n_positions": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_eps",
            "vocab_size": "vocab_size",
            "type_vocab_size": "type_vocab_size",
        },
        only={
            "activation_function": ("swiglu",),
            "prenorm": (False,),
            "parallel_block": (False,),
            "use_rms_norm": (False, None),
            "qkv_proj_bias": (False,),
            "mlp_fc1_bias": (False,),
            "mlp_fc2_bias": (False,),
            "causal": (False,),
            "rotary_emb_fraction": (1.0,),
            "rotary_emb_base": (1000, 1000.0),
            "rotary_emb_interleaved": (False,),
            "rotary_emb_scale_base": (None,),
            "rotary_scaling_factor": (None,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "tie_word_embeddings": (True,),
            "add_cross_attention": (False,),
        },
        unused=frozenset(
            {
                "_name_or_path",
                "architectures",
                "attn_pdrop",
                "auto_map",
                "bos_token_id",
                "dense_seq_output",
                "dtype",
                "embd_pdrop",
                "eos_token_id",
                "fused_bias_fc",
                "fused_dropout_add_ln",
                "id2label",
                "initializer_range",
                "label2id",
                "last_layer_subset",
                "max_trained_positions",
                "model_type",
                "num_labels",
                "pad_token_id",
                "pad_vocab_size_multiple",
                "resid_pdrop",
                "sequence_parallel",
                "summary_activation",
                "summary_first_dropout",
                "summary_proj_to_labels",
                "summary_type",
                "summary_use_proj",
                "torch_dtype",
                "transformers_version",
                "use_cache",
                "use_flash_attn",
                "use_xentropy",
            }
        ),
    ),
}
"""Model types whose published `config.json` is that of remote code."""


def own_settings(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a `config.json` under the names that transformers has for its settings.

    Raises:
        UserError: it has a setting that is not known, or a value that transformers' own network does not compute.
    """
    renamed = RENAMED_SETTINGS.get(str(config.get("model_type")))
    if renamed is None or not any(key in config for key in renamed.names if renamed.names[key] != key):
        return config
    made = {"model_type": config["model_type"], "architectures": config.get("architectures")}
    for key, value in config.items():
        if key in renamed.names:
            made[renamed.names[key]] = value
        elif key in renamed.only:
            if value not in renamed.only[key]:
                raise UserError(f"{path}: {key} {value!r} is not what transformers' own network computes")
        elif key not in renamed.unused:
            raise UserError(f"{path}: key {key!r} is not known", nearest(key, [*renamed.names, *renamed.only]))
    return made
