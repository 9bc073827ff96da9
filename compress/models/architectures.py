"""The common architectures: how their tensors are named, and what each linear layer of a block does. No torch here.

Pruning heads, channels or whole sublayers needs to know which rows and columns belong together. A checkpoint does not say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Sublayer = Literal["attention", "mlp"]


@dataclass(frozen=True)
class Anatomy:
    """The roles of a block's layers. Layer names are relative to the block."""

    attention: tuple[str, ...]
    """Names of the query, key and value projections, in that order, or of the one layer that computes all three."""
    output: str
    """Name of the attention's output projection. Its inputs are the concatenated outputs of the heads."""
    up: tuple[str, ...]
    """Names of the layers that expand to the MLP's channels: one layer, or gate and value."""
    down: str
    """Name of the layer that maps the MLP's channels back to the hidden size."""
    replacements: Mapping[Sublayer, Mapping[str, str]]
    """Classes of `compress.layers.dropped` that replace modules when a sublayer is dropped, by sublayer and module name.
    A norm whose output nothing reads any more is replaced too."""
    halves: int = 1
    """Number of stacked matrices in each expanding layer: 2 where one layer holds gate and value, one after the other."""
    heads_in_config: bool = True
    """Whether the architecture's own config can store the number of heads independently of their width."""
    channels_key: str = "intermediate_size"
    """Key of `config.json` for the number of the MLP's channels."""
    norms: Mapping[Sublayer, str] = field(default_factory=dict, compare=False)
    """The RMSNorm before each sublayer, where only that sublayer's layers behind this norm read the residual stream, and only its
    `output` or `down` writes into it: such a stream can be rotated. Empty for other layouts."""
    refused: Mapping[Literal["heads", "attention", "stream"], str] = field(default_factory=dict, compare=False)
    """What cannot be dropped (`heads`, `attention`) or rotated (`stream`), and why not, in words that follow "because"."""
    distinguishing_module: str = field(default="", compare=False)
    """Name of a module that only this layout has; empty where the linear layers already identify it."""


_NORMS_ON_STREAM = "its layer norms follow the residual addition and subtract the mean of the channels, which no rotation keeps"
_LAYER_NORMS = "its layer norms subtract the mean of the channels, which no rotation keeps"
_NORMS_ON_OUTPUTS = "norms follow attention and MLP too, and weigh channels on their way into the residual stream"
_SHARED_BIAS = "the position bias has a column for each head, and all blocks share it"
# BERT's norms follow the residual addition, and stay. Measured on MiniLM without two of its MLPs: cosine 0.77 to the original when
# their norms are dropped too, 0.90 when only the MLPs are.
_BERT_MLP = {"intermediate": "First", "output.dense": "Zeros"}
_BERT: Mapping[Sublayer, Mapping[str, str]] = {
    "attention": {"attention.self": "FirstOfTwo", "attention.output.dense": "Zeros"},
    "mlp": _BERT_MLP,
}
_DECODER = {
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": "self_attn.o_proj",
    "up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
_NORMS_AFTER: Mapping[Sublayer, Mapping[str, str]] = {"attention": {"self_attn": "ZerosOfTwo"}, "mlp": {"mlp": "Zeros"}}
"""Where the norms follow the residual addition, as in BERT."""
_T5 = {
    "attention": tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    "output": "layer.0.SelfAttention.o",
    "down": "layer.1.DenseReluDense.wo",
    "replacements": {"mlp": {"layer.1": "First"}},
    "channels_key": "d_ff",
    "norms": {"attention": "layer.0.layer_norm", "mlp": "layer.1.layer_norm"},
    "refused": {"heads": _SHARED_BIAS, "attention": "attention makes the position bias and hands it on to the next block"},
}
BLOCK_LAYOUTS = {
    "BERT, RoBERTa, XLM-RoBERTa": Anatomy(
        attention=("attention.self.query", "attention.self.key", "attention.self.value"),
        output="attention.output.dense",
        up=("intermediate.dense",),
        down="output.dense",
        replacements=_BERT,
        heads_in_config=False,
        refused={"stream": _NORMS_ON_STREAM},
    ),
    "MPNet": Anatomy(
        attention=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        output="attention.attn.o",
        up=("intermediate.dense",),
        down="output.dense",
        replacements={"attention": {"attention.attn": "ZerosOfTwo"}, "mlp": _BERT_MLP},
        heads_in_config=False,
        refused={"heads": _SHARED_BIAS, "stream": _NORMS_ON_STREAM},
    ),
    "DeBERTa v2, v3": Anatomy(
        attention=("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
        output="attention.output.dense",
        up=("intermediate.dense",),
        down="output.dense",
        replacements=_BERT,
        heads_in_config=False,
        refused={"heads": "its relative positions are projected to each head too", "stream": _NORMS_ON_STREAM},
    ),
    "DistilBERT": Anatomy(
        attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        output="attention.out_lin",
        up=("ffn.lin1",),
        down="ffn.lin2",
        replacements={"attention": {"attention": "ZerosOfTwo"}, "mlp": {"ffn": "Zeros"}},
        heads_in_config=False,
        channels_key="hidden_dim",
        refused={"stream": _NORMS_ON_STREAM},
    ),
    "T5": Anatomy(
        **_T5,  # type: ignore[arg-type]
        up=("layer.1.DenseReluDense.wi",),
    ),
    "T5 1.1, mT5, UMT5": Anatomy(
        **_T5,  # type: ignore[arg-type]
        up=("layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
    ),
    "NomicBert, Gte": Anatomy(
        **_DECODER,  # type: ignore[arg-type]
        replacements=_NORMS_AFTER,
        refused={"stream": _NORMS_ON_STREAM},
        distinguishing_module="post_mlp_layernorm",
    ),
    "Jina 3": Anatomy(
        **{**_DECODER, "up": ("mlp.fc1",), "down": "mlp.fc2"},  # type: ignore[arg-type]
        replacements=_NORMS_AFTER,
        refused={"stream": _NORMS_ON_STREAM},
        distinguishing_module="post_mlp_layernorm",
    ),
    "Gemma": Anatomy(
        **_DECODER,  # type: ignore[arg-type]
        replacements={
            "attention": {"self_attn": "ZerosOfTwo", "input_layernorm": "First", "post_attention_layernorm": "First"},
            "mlp": {"mlp": "Zeros", "pre_feedforward_layernorm": "First", "post_feedforward_layernorm": "First"},
        },
        refused={"stream": _NORMS_ON_OUTPUTS},
        distinguishing_module="pre_feedforward_layernorm",
    ),
    "Mistral, Llama, Qwen": Anatomy(
        **_DECODER,  # type: ignore[arg-type]
        replacements={
            "attention": {"self_attn": "ZerosOfTwo", "input_layernorm": "First"},
            "mlp": {"mlp": "Zeros", "post_attention_layernorm": "First"},
        },
        norms={"attention": "input_layernorm", "mlp": "post_attention_layernorm"},
    ),
    "ModernBERT": Anatomy(
        attention=("attn.Wqkv",),
        output="attn.Wo",
        up=("mlp.Wi",),
        halves=2,
        down="mlp.Wo",
        replacements={
            "attention": {"attn": "ZerosOfTwo", "attn_norm": "First"},
            "mlp": {"mlp": "Zeros", "mlp_norm": "First"},
        },
        heads_in_config=False,
        refused={"stream": _LAYER_NORMS},
    ),
}


def anatomy_of(tensors: Iterable[str]) -> Anatomy:
    """Return the roles of a block's layers.

    Args:
        tensors: names of the block's tensors, relative to the block. One of the two sublayers may be missing.

    Raises:
        ValueError: the names match none of `BLOCK_LAYOUTS`.
    """
    names = set(tensors)
    halves: list[Anatomy] = []
    for layout in BLOCK_LAYOUTS.values():
        attention = all(f"{layer}.weight" in names for layer in (*layout.attention, layout.output))
        mlp = all(f"{layer}.weight" in names for layer in (*layout.up, layout.down))
        if layout.distinguishing_module and f"{layout.distinguishing_module}.weight" not in names:
            continue
        if attention and mlp:
            return layout
        if attention or mlp:
            halves.append(layout)
    if halves:  # one sublayer is enough: a variant may have dropped the other
        return halves[0]
    example = f" (such as {min(names)})" if names else ""
    raise ValueError(f"the layout of its blocks{example} is unknown; known layouts: {'; '.join(BLOCK_LAYOUTS)}")


@dataclass(frozen=True)
class OwnArchitecture:
    """An architecture that this project implements because transformers does not have it.

    Each field is `module:function`, imported on first use.
    """

    spec: str
    """Function that reads the `EmbedderSpec` from the folder's path. It does not import torch."""
    config: str
    """Function that makes the backbone's config from the content of `config.json`: one of transformers' own config classes, or one
    that has `num_hidden_layers`."""
    network: str
    """Function that builds the network from a `ModelFolder`, with its parameters on the meta device."""


OWN_ARCHITECTURES: Mapping[str, OwnArchitecture] = {
    "nvembed": OwnArchitecture(
        spec="compress.models.text.nv_embed:read_spec",
        config="compress.models.text.nv_embed:read_config",
        network="compress.models.network.nv_embed:build",
    ),
    # A table of tokens, and no blocks. Folders of other libraries are read by `compress.models.text.static`.
    "static": OwnArchitecture(
        spec="compress.models.text.static:read_spec",
        config="compress.models.text.static:read_config",
        network="compress.models.network.static:build",
    ),
}
"""The architectures by `model_type`. A checkpoint of one holds exactly the network's tensors, under their names in the network."""


ENCODERS = ("t5", "mt5", "umt5")
"""Encoder-decoders by `model_type` whose encoder alone is the network, as sentence-transformers loads them."""
AUTO_CLASSES: Mapping[str, str] = dict.fromkeys(ENCODERS, "AutoModelForTextEncoding")
"""The class of transformers that builds an architecture's network, by `model_type`; `AutoModel` for all others."""

TRANSPOSED = ("gpt2", "openai-gpt")
"""Architectures by `model_type` whose blocks have transformers' Conv1D for linear layers: their weights are stored [in, out]."""


def one_set_of_blocks(config: Mapping[str, Any]) -> str | None:
    """Return why blocks cannot be worked on one by one, if they share their weights, as ALBERT's do; else None."""
    groups, blocks = config.get("num_hidden_groups"), config.get("num_hidden_layers")
    if not isinstance(groups, int) or not isinstance(blocks, int) or groups >= blocks:
        return None
    shared = "one set" if groups == 1 else f"{groups} sets"
    return f"all {blocks} blocks share {shared} of weights, and run them again and again"


# Block prefixes of the common architectures: encoder.layer.3., layers.3., h.3., blocks.3., transformer.layer.3.
BLOCK = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")

# Two-dimensional weights inside blocks that are look-up tables, not linear layers.
_LOOKED_UP = re.compile(r"relative_attention_bias|embed|rotary")

LAYER_WEIGHTS = "text_head.layers.layer_weights"
"""The weights of the blocks' outputs in a model whose head averages them (WeightedLayerPooling)."""
AFTER_POOLING = "text_head.after."
"""Prefix of the names of the tensors of modules after pooling; the module's number follows, from 0."""
HEAD_PREFIX = "latent_attention_model."
"""Prefix of the names of NV-Embed's head tensors."""

# Linear layers of the folded head. The published head is not listed: its projections are quantized only after folding.
_HEAD_LINEARS = re.compile(rf"{re.escape(HEAD_PREFIX)}(?:scores|values|net\.\d+)\.weight")


def is_block_linear(name: str, dimensions: int) -> bool:
    """Whether a parameter is the weight of a linear layer inside a block: the layers that compression works on.

    Args:
        name: the parameter's name in the network.
        dimensions: number of its dimensions.
    """
    block = BLOCK.search(name)
    return block is not None and name.endswith(".weight") and dimensions == 2 and not _LOOKED_UP.search(name, block.end())


def is_in_block(name: str) -> bool:
    """Whether a module or parameter with this name belongs to a block."""
    return BLOCK.search(f"{name}.") is not None


def place_in_block(name: str) -> tuple[int, str] | None:
    """Return the number of a tensor's block and its name relative to that block; None if it belongs to no block."""
    block = BLOCK.search(name)
    return None if block is None else (int(block.group(1)), name[block.end() :])


def block_path(name: str) -> str | None:
    """Return the name of a tensor's block, such as `encoder.layer.3`; None if it belongs to no block."""
    block = BLOCK.search(name)
    return None if block is None else name[: block.end() - 1]


def renumbered(name: str, number: int) -> str:
    """Return the name of a block's module or tensor with the block's number replaced."""
    block = BLOCK.search(f"{name}.")
    assert block is not None, f"{name} belongs to no block"
    return f"{name[: block.start(1)]}{number}{name[block.end(1) :]}"


def one_module_later(name: str) -> str:
    """Return the name of a tensor after pooling once another module has come before all others; other names stay."""
    if not name.startswith(AFTER_POOLING):
        return name
    number, _, rest = name.removeprefix(AFTER_POOLING).partition(".")
    return f"{AFTER_POOLING}{int(number) + 1}.{rest}"


def is_head_linear(name: str) -> bool:
    """Whether a parameter is the weight of a linear layer of NV-Embed's folded head."""
    return _HEAD_LINEARS.fullmatch(name) is not None
