"""A checkpoint's files are of the right types and of one model, before a network is built of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests_support import folder_of

from compress.common.errors import UserError
from compress.models.files.headers import read_header
from compress.models.opened import open_model
from compress.runtimes.loading import load

Copy = Callable[[Path], Path]


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweighed(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: input should be less than or equal to 10000, got 1000000000"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: input should be a valid integer, got 'two'"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers: input should be a valid integer"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, and the weights next to it have 2 blocks"),
        ({"num_hidden_layers": 300}, "num_hidden_layers is 300, and the weights next to it have 2 blocks"),
        ({"hidden_size": 0}, "hidden_size: input should be greater than or equal to 1"),
        ({"vocab_size": 10**8}, "vocab_size is 100,000,000, and the table in the weights next to it has 600 rows"),
        ({"max_position_embeddings": 10**8}, "max_position_embeddings is 100,000,000, and the table"),
        ({"num_attention_heads": 7}, "transformers builds no network of it"),
        ({"hidden_act": "evil"}, "transformers builds no network of it: KeyError: 'evil'"),
        ({"architectures": 5}, "architectures: input should be a valid list, got 5"),
        ({"model_type": ["bert"]}, "model_type: input should be a valid string"),
        ({"text_config": {"hidden_size": -1}}, "text_config.hidden_size: input should be greater"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantization_config: quantized by another library \(gptq\)"),
        ({"compression_config": {"format": "x"}}, "compression_config: quantized by another library"),
    ],
)
def test_a_config_of_wrong_types_or_of_another_model(bert: Path, copy_of: Copy, changes: dict[str, Any], message: str) -> None:
    folder = copy_of(bert)
    edited(folder / "config.json", **changes)
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        load(folder)
    with pytest.raises(UserError, match=rf"config\.json.*{message}"):
        open_model(folder_of(folder))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float8_e4m3fn])
def test_weights_that_are_no_floating_point_numbers(bert: Path, copy_of: Copy, dtype: torch.dtype) -> None:
    folder, name = copy_of(bert), "encoder.layer.0.attention.self.query.weight"
    reweighed(folder, lambda tensors: {**tensors, name: tensors[name].to(dtype)})
    for opened in (load, lambda folder: open_model(folder_of(folder))):
        with pytest.raises(UserError, match=rf"model\.safetensors: {name}: is (I8|I16|F8_E4M3)"):
            opened(folder)


def test_another_library_s_file_of_quantization(bert: Path, copy_of: Copy) -> None:
    folder = copy_of(bert)
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(UserError, match=r"quantize_config\.json: the weights next to it are quantized by another library"):
        load(folder)


def test_a_folder_without_tokenizer_files_is_refused(bert: Path, copy_of: Copy) -> None:
    folder = copy_of(bert)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer files"):
        load(folder)


def test_tokens_that_the_table_does_not_have(bert: Path, copy_of: Copy) -> None:
    folder = copy_of(bert)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {token: number if number < 100 else number + 10**6 for token, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the tokenizer gives token 1\d{6}, .*, and the network's table has 600 rows"):
        load(folder).encode(["the parcel was delivered yesterday"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"model_max_length": -5}, "model_max_length: input should be greater than 0"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 5}}, "added_tokens_decoder.x"),
        ("tokenizer.json", {}, "no tokenizer that transformers can load"),
        ("modules.json", None, "input should be a valid list"),
        ("modules.json", [{"type": "sentence_transformers.models.Transformer"}], "0.path: missing"),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Transformer", "path": "../x"}],
            "0.path: '../x' leaves the folder",
        ),
        (
            "modules.json",
            [{"type": "sentence_transformers.models.Transformer", "path": "/etc"}],
            "0.path: '/etc' leaves the folder",
        ),
        ("1_Pooling/config.json", [], "must hold a JSON object, this is a list"),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": "false"}, "pooling_mode_cls_token: must be true or false"),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": 384},
            "word_embedding_dimension 384, and config.json has hidden_size 48",
        ),
        ("sentence_bert_config.json", {"max_seq_length": -1}, "max_seq_length: input should be greater"),
        ("sentence_bert_config.json", {"max_seq_length": "x"}, "max_seq_length: input should be a valid integer"),
        ("config_sentence_transformers.json", {"prompts": ["x"]}, "prompts: input should be a valid dictionary"),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}, "prompts.query: input should be a valid string"),
        ("model.safetensors.index.json", {"weight_map": {"a": "../b.safetensors"}}, "weight_map: .* leaves the folder"),
    ],
)
def test_settings_of_wrong_types(bert: Path, copy_of: Copy, file: str, content: Any, message: str) -> None:
    folder = copy_of(bert)
    if "index" in file:
        (folder / "model.safetensors").rename(folder.parent / "b.safetensors")
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load(folder)


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    made = json.dumps(change(json.loads(content[8 : 8 + length]))).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "F7"}, "a: dtype 'F7' is not known"),
        ({"dtype": 5}, "a.dtype: input should be a valid string"),
        ({"shape": [-1, -4]}, "a.shape.0: input should be greater than or equal to 0"),
        ({"shape": "ab"}, "a.shape"),
        ({"shape": [10**12, 10**12]}, "a: data_offsets 0 to 16 do not follow 0 with the bytes of F32"),
        ({"data_offsets": [16, 0]}, "a: data_offsets 16 to 0"),
        ({"data_offsets": [16, 32]}, "data_offsets 16 to 32 do not follow"),
        ({"data_offsets": [0, 1, 2]}, "a.data_offsets"),
        (None, "a: input should be"),
    ],
)
def test_a_header_that_is_not_one(tmp_path: Path, changes: dict[str, Any] | None, message: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, path)
    header(path, lambda content: {**content, "a": changes and {**content["a"], **changes}})
    with pytest.raises(UserError, match=rf"m\.safetensors.*{message}"):
        read_header(path)


def test_a_header_has_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length, message in ((2**63, "longer than the file"), (200_000_000, "more than the 100,000,000 of the format")):
        with path.open("wb") as file:
            file.write(struct.pack("<Q", length))
            file.truncate(200_000_100)  # takes no room
        with pytest.raises(UserError, match=message):
            read_header(path)
    path.write_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_header(path)


@pytest.mark.parametrize("file", ["vocab.txt", "merges.txt", "spiece.model", "added_tokens.json", "cl100k_base.tiktoken"])
def test_every_file_of_a_tokenizer_changes_the_fingerprint(bert: Path, copy_of: Copy, file: str) -> None:
    folder = copy_of(bert)
    before = folder_of(folder).fingerprint
    (folder / file).write_text("{}")
    added = folder_of(folder).fingerprint
    (folder / file).write_text("{ }")
    assert len({before, added, folder_of(folder).fingerprint}) == 3
