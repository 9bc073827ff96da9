"""Pickled weights to safetensors: what is read, what is refused, from a folder and from the hub."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import Client
from safetensors.torch import load_file
from standin import StandIn

from compress.common.errors import UserError
from compress.models.convert import convert, write_safetensors


def pickle_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Put a pickle in the place of a folder's safetensors, with a tied head, a transposed view and half precision in it."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["cls.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    tensors["odd.view"] = torch.arange(12.0).reshape(3, 4).t()
    tensors["odd.row"] = tensors["embeddings.word_embeddings.weight"][3]
    tensors["odd.half"] = torch.tensor([1.0, float("nan")], dtype=torch.bfloat16)
    torch.save(tensors, folder / "pytorch_model.bin")
    return tensors


def same(tensors: dict[str, torch.Tensor], file: Path) -> bool:
    read = load_file(file)
    return read.keys() == tensors.keys() and all(
        read[name].dtype == tensor.dtype and torch.equal(read[name].nan_to_num(), tensor.nan_to_num())
        for name, tensor in tensors.items()
    )


def test_a_model_on_the_hub_is_converted_with_its_modules(hub: StandIn, client: Client, tiny: Path, tmp_path: Path) -> None:
    tensors = pickle_weights(tiny)
    (tiny / "2_Dense").mkdir()
    dense = {"linear.weight": torch.ones(4, 48), "linear.bias": torch.zeros(4)}
    torch.save(dense, tiny / "2_Dense" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    entries = json.loads((tiny / "modules.json").read_text())
    entries.append({"idx": 3, "name": "3", "path": "2_Dense", "type": "sentence_transformers.models.Dense"})
    (tiny / "modules.json").write_text(json.dumps(entries))
    hub.add("models", "owner/tiny", tiny)
    done = client.compress("convert", "owner/tiny", "--to", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    written = [str(tmp_path / "new" / name) for name in ("model.safetensors", "2_Dense/model.safetensors")]
    assert done.stdout.splitlines() == written
    assert same(tensors, tmp_path / "new" / "model.safetensors")
    assert same(dense, tmp_path / "new" / "2_Dense" / "model.safetensors")
    names = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert names >= {"config.json", "tokenizer.json", "1_Pooling/config.json", "README.md"}
    assert not [name for name in names if name.endswith((".bin", ".py"))]
    assert hub.asked("GET", "training_args.bin") == []


def test_shards_are_converted_with_their_index(tiny: Path, tmp_path: Path) -> None:
    tensors = pickle_weights(tiny)
    names = sorted(tensors)
    files = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for file, half in zip(files, halves, strict=True):
        torch.save({name: tensors[name] for name in half}, tiny / file)
    (tiny / "pytorch_model.bin").unlink()
    places = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (tiny / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    convert(str(tiny), tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{1 + (name in halves[1])}-of-00002.safetensors" for name in names}
    read = {name: load_file(tmp_path / "new" / file)[name] for name, file in index["weight_map"].items()}
    assert all(torch.equal(read[name].nan_to_num(), tensors[name].nan_to_num()) for name in names)
    assert not (tmp_path / "new" / "pytorch_model.bin.index.json").exists()


class Harmful:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_what_would_run_code_is_refused_in_one_line_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    (tiny / "model.safetensors").unlink()
    torch.save({"weight": torch.ones(2), "more": Harmful(tmp_path / "ran")}, tiny / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin: refused, because it holds more than tensors: posix.mkdir$") as refused:
        convert(str(tiny), tmp_path / "new")
    assert refused.value.hint == "nothing of it was run; ask its author for safetensors"
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "weight": torch.ones(2)}, "holds more than named tensors: 'epoch' is int"),
        ({"state_dict": {"weight": torch.ones(2)}}, "holds more than named tensors: 'state_dict' is dict"),
        ([torch.ones(2)], "holds list in the place of named tensors"),
        ({}, "holds no tensor"),
        ({"table": torch.eye(3).to_sparse()}, "'table' is a tensor that safetensors cannot hold"),
    ],
)
def test_what_is_not_named_tensors_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert (write_safetensors(tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors") or "").startswith(words)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_broken_files_and_foreign_pickles_are_refused(tmp_path: Path) -> None:
    whole, file = tmp_path / "whole.bin", tmp_path / "pytorch_model.bin"
    torch.save({"weight": torch.ones(2000)}, whole)
    file.write_bytes(whole.read_bytes()[:3000])
    assert "\n" not in (said := write_safetensors(file, tmp_path / "out") or "")
    assert said
    file.write_bytes(b"")
    assert (write_safetensors(file, tmp_path / "out") or "").startswith("not a whole file of torch.save")
    file.write_bytes(pickle.dumps({"path": Harmful(tmp_path / "ran")}))
    assert (write_safetensors(file, tmp_path / "out") or "").startswith(
        "refused by torch.load(weights_only=True): Unsupported operand"
    )
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_a_folder_without_pickles_needs_no_conversion(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no pytorch_model.bin or adapter_model.bin") as refused:
        convert(str(tiny), tmp_path / "new")
    assert "needs no conversion" in refused.value.hint
    pickle_weights(tiny)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(UserError, match="is there already"):
        convert(str(tiny), tmp_path / "new")
