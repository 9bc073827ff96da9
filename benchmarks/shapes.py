"""Writes the shapes that the package knows by name, so that `compress plan` and `random:NAME` need no file of the model.

    python benchmarks/shapes.py                  # all of compress/data/shapes but NV-Embed-v2's
    python benchmarks/shapes.py BAAI/bge-m3

Each network is built from its published config without memory for weights, and its tensors are listed. The counts are those that
mteb 2.26's registry states for the published checkpoints; tensors of a checkpoint that the network lacks are counted by hand.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from compress.models.folder import ModelFolder
from compress.models.network.build import empty_network
from compress.models.random_weights import one_piece_tokenizer

SOURCE = "mteb 2.26.24, ModelMeta.n_parameters; https://huggingface.co/"


@dataclass(frozen=True)
class Published:
    """What is known of a model from its card and its config."""

    parameters: int
    """Of the checkpoint, as published."""
    dtype: str
    """Of the checkpoint, as safetensors names it."""
    licence: str
    config: dict[str, Any]
    """The fields of `config.json` that the network follows from."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Parameters of the checkpoint that are not among the tensors listed here, by what they are."""


XLM_ROBERTA = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "hidden_act": "gelu",
    "vocab_size": 250_002,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
POOLER = 1024 * 1024 + 1024
# jina-embeddings-v3: five adapters of rank 4 in each linear layer, the token and type tables and the pooler.
JINA_LAYERS = 24 * ((1024 + 3072) + (1024 + 1024) + (1024 + 4096) + (4096 + 1024))
JINA_ADAPTERS = 5 * 4 * (JINA_LAYERS + (250_002 + 1024) + (1 + 1024) + (1024 + 1024))

MODELS = {
    "nvidia/Nemotron-3-Embed-8B-BF16": Published(
        parameters=7_952_683_008,
        dtype="BF16",
        licence="OpenMDW-1.1",
        config={
            "model_type": "ministral3",
            "is_causal": False,
            "hidden_size": 4096,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14336,
            "hidden_act": "silu",
            "vocab_size": 131_072,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "Qwen/Qwen3-Embedding-8B": Published(
        parameters=7_567_295_488,
        dtype="BF16",
        licence="Apache-2.0",
        config={
            "model_type": "qwen3",
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12_288,
            "hidden_act": "silu",
            "vocab_size": 151_665,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "sliding_window": None,
            "use_sliding_window": False,
        },
    ),
    "google/embeddinggemma-300m": Published(
        parameters=307_581_696,
        dtype="F32",
        licence="gemma",
        config={
            "model_type": "gemma3_text",
            "use_bidirectional_attention": True,
            "hidden_size": 768,
            "num_hidden_layers": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "intermediate_size": 1152,
            "hidden_activation": "gelu_pytorch_tanh",
            "vocab_size": 262_144,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 512,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
        },
        left_out={"two Dense modules, 768 to 3072 and back": 2 * 768 * 3072},
    ),
    "BAAI/bge-m3": Published(
        parameters=568_000_000,
        dtype="F32",
        licence="MIT",
        config={"model_type": "xlm-roberta", **XLM_ROBERTA},
        left_out={"the pooler, which no embedding uses": POOLER},
    ),
    "jinaai/jina-embeddings-v3": Published(
        parameters=572_310_396,
        dtype="BF16",
        licence="CC-BY-NC-4.0",
        config={
            "model_type": "jina_embeddings_v3",
            **XLM_ROBERTA,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
        },
        left_out={"adapters of five tasks, rank 4": JINA_ADAPTERS, "the pooler, which no embedding uses": POOLER},
    ),
    "nomic-ai/nomic-embed-text-v1.5": Published(
        parameters=136_731_648,
        dtype="F32",
        licence="Apache-2.0",
        config={
            "model_type": "nomic_bert",
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "hidden_act": "silu",
            "vocab_size": 30_528,
            "max_position_embeddings": 2048,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
}


def listing(name: str, published: Published) -> str:
    """Return the JSON of a model's shape, a tensor a line."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(published.config), encoding="utf-8")
        one_piece_tokenizer(Path(folder))
        state = empty_network(ModelFolder(name, Path(folder))).state_dict()
    tensors = {key: [published.dtype, list(state[key].shape)] for key in sorted(state) if state[key].is_floating_point()}
    head = {
        "config": published.config,
        "licence": published.licence,
        "published": {"parameters": published.parameters, "source": SOURCE + name, "left_out": published.left_out},
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in tensors.items()]
    return "\n".join(["{", *lines, ' "tensors": {', ",\n".join(rows), " }", "}"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*MODELS, []], help="by default all")
    folder = Path(str(resources.files("compress.data"))) / "shapes"
    for name in parser.parse_args().names or MODELS:
        path = folder / f"{name.replace('/', '--')}.json"
        path.write_text(listing(name, MODELS[name]), encoding="utf-8")
        print(path.name)


if __name__ == "__main__":
    main()
