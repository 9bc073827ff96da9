"""Folders of models: what is read, what is refused, what is written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests_support import folder_of

import compress
from compress.common.errors import UserError
from compress.common.files import save_array
from compress.models.architectures import is_block_linear
from compress.models.files.headers import TensorInfo, read_header, weight_bytes
from compress.models.files.shards import join_shards, shard, write_tensors
from compress.models.shape import ModelShape, check_patterns, known_shape, matching
from compress.models.source import find, find_shape


def test_a_header_says_what_the_file_holds(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(2, dtype=torch.int8)}, tmp_path / "m.safetensors")
    assert read_header(tmp_path / "m.safetensors") == {"a": TensorInfo("F32", (3, 5)), "b": TensorInfo("I8", (2,))}


@pytest.mark.parametrize("most", [10**9, 0])  # one file, and shards
def test_a_shape_bounds_the_file_of_its_tensors(tmp_path: Path, most: int) -> None:
    segments = [{f"block.{block}.{name}": torch.zeros(33, 8 + block) for name in ("k", "vé")} for block in range(12)]
    for number, segment in enumerate(segments):
        write_tensors(shard(tmp_path, number, len(segments)), segment)
    join_shards(tmp_path, len(segments), single_file_bytes=most)
    tensors = {name: info for path in tmp_path.glob("*.safetensors") for name, info in read_header(path).items()}
    bound, size = ModelShape("it", tensors, {}).file_bytes, weight_bytes(tmp_path)
    assert len(tensors) == 24
    assert bound - 24 * 24 - 64 <= size <= bound  # 24 digits less in the offsets of a tensor


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3, 5)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"m\.safetensors"):
        read_header(path)


def test_pickles_are_never_opened(bert: Path, copy_of) -> None:
    folder = copy_of(bert)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights \(pytorch_model\.bin\)") as caught:
        find_shape(str(folder))
    assert "safetensors" in caught.value.hint


def test_a_checkpoint_that_lacks_a_tensor_is_refused(bert: Path, copy_of) -> None:
    folder = copy_of(bert)
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 tensors .*encoder\.layer\.1\.output\.dense\.weight"):
        compress.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "pooling 'median' is not supported"),
        ("1_Pooling/config.json", '{"pooling_mode_median_tokens": true}', "key 'pooling_mode_median_tokens' is not known"),
        ("modules.json", '[{"path": "", "type": "x.Transformer"}]', "module 'x.Transformer' is code of the repository's own"),
        ("modules.json", '[{"path": "", "type": "sentence_transformers.models.CNN"}]', "module 'CNN' is not supported"),
        ("sentence_bert_config.json", '{"max_seq_lenght": 64}', "key 'max_seq_lenght' is not known"),
        ("sentence_bert_config.json", '{"processing_kwargs": {"text": {"padding": true}}}', "processing_kwargs is not supported"),
        ("config_sentence_transformers.json", '{"truncate_dims": 8}', "key 'truncate_dims' is not known"),
        ("modules.json", '[{"path": ""\n,,', "modules.json, line 2: not JSON"),
        ("config_sentence_transformers.json", '{"prompts": {"a": "b"}, "default_prompt_name": "c"}', "'c' is not among"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(bert: Path, copy_of, file: str, content: str, message: str) -> None:
    folder = copy_of(bert)
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        print(folder_of(folder).spec)


def test_unknown_architectures_are_refused(bert: Path, copy_of) -> None:
    folder = copy_of(bert)
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    with pytest.raises(UserError, match="model_type 'nonesuch' is not an architecture"):
        compress.load(str(folder), device="cpu")


def test_missing_models_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder") as caught:
        find("minilmm")
    assert caught.value.hint == "did you mean 'minilm'?"
    with pytest.raises(UserError, match=r"no .*safetensors"):
        find_shape(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        find("nobody/no-such-model-at-all")


def test_the_fingerprint_follows_the_content(bert: Path, copy_of) -> None:
    folder = copy_of(bert)
    assert folder_of(folder).fingerprint == folder_of(bert).fingerprint
    config = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 1e-6}
    (folder / "config.json").write_text(json.dumps(config))
    assert folder_of(folder).fingerprint != folder_of(bert).fingerprint


def test_an_array_is_written_or_the_reason_given(tmp_path: Path) -> None:
    save_array(tmp_path / "v.npy", np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(UserError, match=r"none/v\.npy: No such file or directory"):
        save_array(tmp_path / "none" / "v.npy", np.zeros(1))


def test_the_shape_of_nv_embed_is_known_without_its_files() -> None:
    shape = known_shape("nvidia/NV-Embed-v2")
    assert shape is not None
    assert shape.parameters == 7_851_016_192
    assert len(shape.tensors) == 304
    assert len(shape.block_linears) == 32 * 7
    assert sum(info.parameters for info in shape.block_linears.values()) == 32 * (218_112_000 - 2 * 4096)


def test_linear_layers_of_blocks_are_told_from_tables() -> None:
    assert is_block_linear("encoder.layer.0.attention.self.query.weight", 2)
    assert is_block_linear("embedding_model.layers.31.mlp.up_proj.weight", 2)
    assert not is_block_linear("embeddings.word_embeddings.weight", 2)
    assert not is_block_linear("layers.0.input_layernorm.weight", 1)
    assert not is_block_linear("block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)


def test_shape_reads_headers_and_leaves_the_pooler_out(bert: Path) -> None:
    shape = folder_of(bert).shape
    network = compress.load(str(bert), device="cpu", dtype="float16").model
    assert shape.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert len(shape.block_linears) == 12


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    assert matching(["a.q", "a.k"], ["*.q"]) == {"a.q"}
    with pytest.raises(ValueError, match=r"'\*\.v' matches none"):
        check_patterns(["a.q", "a.k"], ["*.v"])
