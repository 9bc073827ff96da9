"""A model's folder: where its parts may lie, and that its files are read once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests_support import compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.methods.quantize.rtn import RTN
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.hub import snapshot_of
from compress.pipeline.recipe_file import parse_recipe

TEXTS = ["the parcel never came", "rain by the evening", ""]


@pytest.fixture
def nested(bert: Path, copy_of: Callable[[Path], Path]) -> Path:
    """The tiny BERT as older sentence-transformers wrote it: the network's files in a folder of their own."""
    folder = copy_of(bert)
    inner = folder / "0_Transformer"
    inner.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(path, inner / path.name)
    entries = json.loads((folder / "modules.json").read_text())
    entries[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(entries))
    return folder


def test_a_transformer_in_a_folder_of_its_own_runs(nested: Path, bert: Path, tmp_path: Path) -> None:
    flat = compress.load(str(bert), device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(compress.load(str(nested), device="cpu").encode(TEXTS), flat)
    np.testing.assert_array_equal(compress.load(str(nested), device="cpu", stream=True).encode(TEXTS), flat)
    recipe = parse_recipe({"name": "small", "steps": [{"method": "rtn"}]})
    records = [compress.run(recipe, model=str(folder), output=tmp_path, compress_only=True) for folder in (nested, bert)]
    made = [compress.load(str(tmp_path / record.run), device="cpu").encode(TEXTS) for record in records]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_lies_in_that_folder_counts_in_the_fingerprint(nested: Path, name: str) -> None:
    before = folder_of(nested).fingerprint
    path = nested / "0_Transformer" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert folder_of(nested).fingerprint != before


def test_what_a_variant_says_is_read_once(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress_to(bert, tmp_path / "variant", RTN())
    read, seen = VariantInfo.read, list[Path]()

    def counted(folder: Path) -> VariantInfo:
        seen.append(folder)
        return read(folder)

    monkeypatch.setattr(VariantInfo, "read", counted)
    compress.load(str(tmp_path / "variant"), device="cpu").encode(TEXTS)
    assert len(seen) == 1


def test_a_checkpoint_is_no_variant(bert: Path) -> None:
    assert ModelFolder("tiny", bert).variant is None
    with pytest.raises(UserError, match="holds no variant"):
        print(ModelFolder("tiny", bert).compressed)


def test_two_modules_of_one_name_are_refused(copy_of, bert: Path) -> None:
    """sentence-transformers keeps modules by name: of two it would run the last."""
    folder = copy_of(bert)
    entries = json.loads((folder / "modules.json").read_text())
    entries[1]["name"] = entries[0]["name"] = "0"
    (folder / "modules.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"modules.json: two modules have the name '0'"):
        assert ModelFolder("m", folder).modules


@pytest.mark.parametrize("named", ["../../elsewhere", "", "x" * 5000])
def test_a_reference_of_the_hubs_cache_names_a_commit(tmp_path: Path, bert: Path, named: str) -> None:
    cached = tmp_path / "models--owner--name"
    shutil.copytree(bert, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40 + "\n")
    assert snapshot_of(cached) == cached / "snapshots" / ("0" * 40)
    (cached / "refs" / "main").write_text(named)
    with pytest.raises(UserError, match=r"refs/main: (names no commit|larger than)"):
        snapshot_of(cached)
