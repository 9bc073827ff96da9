"""What the tensors of the common architectures are called, and what the linear layers of a block do. No torch here.

Pruning heads, channels or whole sublayers has to know which rows and columns belong together; nothing in a checkpoint says so.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Anatomy:
    """A block's layers, named from the block on."""

    attention: tuple[str, ...]
    """Queries, keys, values; or one layer that makes all three."""
    output: str
    """Takes the heads' outputs, one beside the other."""
    rising: tuple[str, ...]
    """Layers whose rows make the MLP's channels: one, or gate and value."""
    falling: str
    """Takes the channels."""
    without: Mapping[Sublayer, Mapping[str, str]]
    """What stands in for which modules where a sublayer is dropped: classes of `compress.layers.dropped`. A norm that nothing reads
    any more goes too."""
    halves: int = 1
    """How many rows of a rising layer make a channel, a stretch of rows each."""
    heads_in_config: bool = True
    """Whether the architecture's own config can say how many heads there are beside how wide they are."""
    mark: str = field(default="", compare=False)
    """A module that tells it from others with the same linear layers."""


# BERT's norms follow the sum of a sublayer and its input, and stay: without two MLPs and their norms MiniLM keeps a cosine of 0.77,
# without the MLPs alone 0.90.
_BERT_MLP = {"intermediate": "First", "output.dense": "Zeros"}
_DECODER = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": "self_attn.o_proj",
    "rising": ("mlp.gate_proj", "mlp.up_proj"),
    "falling": "mlp.down_proj",
}
KINDS = {
    "BERT, RoBERTa, XLM-RoBERTa": Anatomy(
        attention=("attention.self.query", "attention.self.key", "attention.self.value"),
        output="attention.output.dense",
        rising=("intermediate.dense",),
        falling="output.dense",
        without={"attention": {"attention.self": "FirstOfTwo", "attention.output.dense": "Zeros"}, "mlp": _BERT_MLP},
        heads_in_config=False,
    ),
    "MPNet": Anatomy(
        attention=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        output="attention.attn.o",
        rising=("intermediate.dense",),
        falling="output.dense",
        without={"attention": {"attention.attn": "ZerosOfTwo"}, "mlp": _BERT_MLP},
        heads_in_config=False,
    ),
    "Gemma": Anatomy(
        **_DECODER,  # type: ignore[arg-type]
        without={
            "attention": {"self_attn": "ZerosOfTwo", "input_layernorm": "First", "post_attention_layernorm": "First"},
            "mlp": {"mlp": "Zeros", "pre_feedforward_layernorm": "First", "post_feedforward_layernorm": "First"},
        },
        mark="pre_feedforward_layernorm",
    ),
    "Mistral, Llama, Qwen": Anatomy(
        **_DECODER,  # type: ignore[arg-type]
        without={
            "attention": {"self_attn": "ZerosOfTwo", "input_layernorm": "First"},
            "mlp": {"mlp": "Zeros", "post_attention_layernorm": "First"},
        },
    ),
    "ModernBERT": Anatomy(
        attention=("attn.Wqkv",),
        output="attn.Wo",
        rising=("mlp.Wi",),
        halves=2,
        falling="mlp.Wo",
        without={
            "attention": {"attn": "ZerosOfTwo", "attn_norm": "First"},
            "mlp": {"mlp": "Zeros", "mlp_norm": "First"},
        },
        heads_in_config=False,
    ),
}


def anatomy_of(tensors: Iterable[str]) -> Anatomy:
    """Tell which layers do what.

    Args:
        tensors: names of a block's tensors, from the block on. A sublayer may be missing.

    Raises:
        ValueError: they are those of no architecture that is known here.
    """
    names = set(tensors)
    for kind in KINDS.values():
        attention = all(f"{layer}.weight" in names for layer in (*kind.attention, kind.output))
        mlp = all(f"{layer}.weight" in names for layer in (*kind.rising, kind.falling))
        if (attention or mlp) and (not kind.mark or f"{kind.mark}.weight" in names):
            return kind
    example = f" (such as {min(names)})" if names else ""
    raise ValueError(f"its blocks' layers{example} are laid out like none of those known here: {'; '.join(KINDS)}")


@dataclass(frozen=True)
class OwnArchitecture:
    """An architecture that transformers does not have and this project does. Each part is `module:function`, imported when used."""

    spec: str
    """From the folder to its `EmbedderSpec`; without torch."""
    config: str
    """From the folder to the backbone's config, one of transformers' own classes."""
    network: str
    """From a `ModelFolder` to the network, its parameters still without values."""


OWN_ARCHITECTURES: Mapping[str, OwnArchitecture] = {
    "nvembed": OwnArchitecture(
        spec="compress.models.text.nv_embed:read_spec",
        config="compress.models.text.nv_embed:read_config",
        network="compress.models.network.nv_embed:build",
    ),
}
"""By `model_type`. Their checkpoints hold exactly the network's tensors, under the names of its modules."""


def imported(place: str) -> Any:
    """Return what `module:function` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


# Blocks as the common architectures name them: encoder.layer.3., layers.3., h.3., blocks.3., transformer.layer.3.
BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")

# Two-dimensional weights inside blocks that are looked up, not multiplied.
_LOOKED_UP = re.compile(r"relative_attention_bias|embed|rotary")

HEAD_PREFIX = "latent_attention_model."
"""What the tensors of NV-Embed's head begin with."""

# Linear layers of the folded head; those of the published one are multiplied out by the fold.
_HEAD_LINEARS = re.compile(rf"{re.escape(HEAD_PREFIX)}(?:scores|values|net\.\d+)\.weight")


def is_block_linear(name: str, dimensions: int) -> bool:
    """Whether a parameter is the weight of a linear layer inside a block: the layers that compression works on."""
    block = BLOCK.search(name)
    return block is not None and name.endswith(".weight") and dimensions == 2 and not _LOOKED_UP.search(name, block.end())


def is_in_block(name: str) -> bool:
    """Whether a module or parameter of that name lies inside a block."""
    return BLOCK.search(f"{name}.") is not None


def place_in_block(name: str) -> tuple[int, str] | None:
    """Return the number of the block that a tensor lies in and its name from there on; None outside of blocks."""
    block = BLOCK.search(name)
    return None if block is None else (int(block.group(1)), name[block.end() :])


def renumbered(name: str, number: int) -> str:
    """Return the name that a module or tensor of a block has in the block of another number."""
    block = BLOCK.search(f"{name}.")
    assert block is not None, f"{name} lies in no block"
    return f"{name[: block.start(1)]}{number}{name[block.end(1) :]}"


def is_head_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer of NV-Embed's folded head."""
    return _HEAD_LINEARS.fullmatch(name) is not None
