"""Checkpoints that keep other names than transformers' network: renamed and split from their headers, read one block at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import folder_of
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

from compress.common.errors import UserError
from compress.models.files.conversion import in_network
from compress.models.files.headers import tensors_in
from compress.models.network.build import empty_network
from compress.models.opened import weights_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
FUSED = {
    "nomic_bert": ("encoder.layers.1.attn.Wqkv.weight", "layers.1.self_attn.{}_proj.weight"),
    "jina_embeddings_v3": ("encoder.layers.1.mixer.Wqkv.weight", "layers.1.self_attn.{}_proj.weight"),
    "gte": ("encoder.layer.1.attention.qkv_proj.weight", "layers.1.self_attn.{}_proj.weight"),
}


@pytest.fixture(autouse=True)
def _with_a_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)


def checkpoint(folder: Path, kind: str) -> nn.Module:
    """Write a network as its published checkpoints are, with the names of remote code."""
    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.for_model(kind, **SIZES, pad_token_id=0), add_pooling_layer=False)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("kind", FUSED)
def test_fused_projections_are_ranges_of_rows(tmp_path: Path, kind: str) -> None:
    network = checkpoint(tmp_path, kind)
    fused, parts = FUSED[kind]
    assert fused in load_file(tmp_path / "model.safetensors")
    folder = folder_of(tmp_path)
    expected = dict(network.state_dict())
    assert {name: info.shape for name, info in folder.headers.items()} == {name: tuple(t.shape) for name, t in expected.items()}
    read = dict(weights_of(folder, empty_network(folder)).read(expected))
    for name, tensor in expected.items():
        assert torch.equal(read[name], tensor), name
    for part in "qkv":  # the bytes, which graphs refer to, are those of the rows
        name = parts.format(part)
        stored = torch.frombuffer(bytearray(folder.tensors[name].read()), dtype=torch.float32).view(16, 16)
        assert torch.equal(stored, expected[name])


def test_other_changes_than_splitting_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    checkpoint(tmp_path, "nomic_bert")
    folder = folder_of(tmp_path)
    turned = WeightConverter("attn.Wqkv", "attn.qkv_proj", operations=[Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda network: [turned])
    with pytest.raises(UserError, match=r"attn\.Wqkv.*transformers changes it by Transpose"):
        in_network(tensors_in(tmp_path / "model.safetensors"), empty_network(folder_of(tmp_path)))
    assert folder.config["model_type"] == "nomic_bert"


def published_config(folder: Path, **changes: object) -> None:
    """Put the config of nomic-bert's remote code in the place of transformers' own."""
    content = {
        "model_type": "nomic_bert", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 24, "vocab_size": 40, "prenorm": False,
        "activation_function": "swiglu", "rotary_emb_base": 1000, "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling.NomicBertModel"},
    } | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))


def test_the_published_config_says_the_same(tmp_path: Path) -> None:
    checkpoint(tmp_path, "nomic_bert")
    published_config(tmp_path)
    config = folder_of(tmp_path).network_config
    assert {key: getattr(config, key) for key in SIZES} == SIZES
    assert folder_of(tmp_path).shape.blocks == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prenorm": True}, "prenorm True is not what transformers' own network computes"),
        ({"rotary_emb_base": 10_000}, "rotary_emb_base 10000 is not"),
        ({"moe_every_n_layers": 2}, "key 'moe_every_n_layers' is not known"),
    ],
)
def test_a_published_config_of_another_network_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    checkpoint(tmp_path, "nomic_bert")
    published_config(tmp_path, **changes)
    with pytest.raises(UserError, match=said):
        _ = folder_of(tmp_path).config


def test_names_are_the_network_s_where_nothing_is_renamed(tmp_path: Path) -> None:
    save_file({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "m.safetensors")

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(2, 2, bias=False)])

    assert list(in_network(tensors_in(tmp_path / "m.safetensors"), Plain())) == ["layers.0.weight"]
