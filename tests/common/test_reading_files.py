"""The room that reads files from outside: what is not a bounded, finite, regular UTF-8 file of the right types is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.common.inputs import inside, own_file, read_as, read_bytes, read_json, read_object, read_text


class Settings(BaseModel):
    """Settings of this test."""

    model_config = ConfigDict(extra="forbid", strict=True)

    length: int
    names: dict[str, str] = {}


def test_a_pipe_a_device_and_a_folder_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(UserError, match=f"{path}: {kind}, not a regular file"):
            read_bytes(path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: cannot be read"):
        read_bytes(tmp_path / "loop")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b"{\n{", "line 2: not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested more than 64 levels deep"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": {"b": 1e999}}', "a.b: inf is not a finite number"),
        (b'{"a": 1' + b"0" * 5_000 + b"}", "too many digits"),
    ],
)
def test_json_that_cannot_be_taken_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(UserError, match=rf"settings\.json.*{message}"):
        read_json(tmp_path / "settings.json")


def test_a_file_has_a_bound_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}")
    assert read_text(tmp_path / "a.json") == "{}"
    assert read_object(tmp_path / "a.json") == {}
    with pytest.raises(UserError, match="larger than 4 bytes"):
        read_bytes(tmp_path / "a.json", limit=4)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(UserError, match="must hold a JSON object, this is a list"):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"length": "x"}, "length: input should be a valid integer, got 'x'"),
        ({}, "length: missing"),
        ({"length": 1, "names": {"a": 5}}, "names.a: input should be a valid string, got 5"),
        ({"length": 1, "lenght": 2}, "lenght: key not known"),
    ],
)
def test_types_are_checked_by_key(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_as(tmp_path / "settings.json", Settings)
    assert str(tmp_path / "settings.json") in caught.value.message
    if "lenght" in message:
        assert caught.value.hint == "did you mean 'length'?"


def test_names_in_files_stay_in_their_folder(tmp_path: Path) -> None:
    assert inside(tmp_path, "1_Pooling", "modules.json: 1.path") == tmp_path / "1_Pooling"
    assert inside(tmp_path, "", "modules.json: 0.path") == tmp_path
    for name in ("../loot", "a/../../loot", "/etc/passwd", "a\0b"):
        with pytest.raises(UserError, match=r"modules\.json: 1\.path: .* leaves the folder"):
            inside(tmp_path, name, "modules.json: 1.path")


def test_links_of_the_hub_s_cache_are_own_files_and_others_are_not(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs = tmp_path / "models--owner--name" / "blobs"
    blobs.mkdir()
    (blobs / "123").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    assert own_file(snapshot, snapshot / "tokenizer.json").read_text() == "{}"
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/123")
    assert own_file(snapshot / "1_Pooling", snapshot / "1_Pooling" / "config.json").read_text() == "{}"

    (tmp_path / "loot").write_text("secret")
    for folder in (snapshot, tmp_path / "plain"):
        folder.mkdir(exist_ok=True)
        (folder / "merges.txt").symlink_to(tmp_path / "loot")
        with pytest.raises(UserError, match=r"merges\.txt: a link to .*loot, outside of"):
            own_file(folder, folder / "merges.txt")
