"""Vectors kept: made once, the same when read again, by another process too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.common.cache import use
from compress.models.text.spec import EmbedderSpec
from compress.runtimes.stored_vectors import StoredEmbedder, VectorStore, key_of


class Counting:
    """Remembers what it was asked for."""

    name, dimension, spec = "counting", 4, EmbedderSpec(default_prompt="d: ")

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def encode(self, texts: Any, prompt: str | None = None, **_: Any) -> np.ndarray:
        self.asked += [(text, prompt) for text in texts]
        return np.stack([np.full(4, float(sum(map(ord, f"{prompt}{text}"))), dtype=np.float32) for text in texts])


def stored(embedder: Counting, folder: Path) -> StoredEmbedder:
    return StoredEmbedder(embedder, lambda: embedder, VectorStore(folder))


def test_each_text_is_embedded_once_for_each_prompt(tmp_path: Path) -> None:
    embedder = Counting()
    first = stored(embedder, tmp_path)
    texts = ["a", "b", "a", "\ud800 lone surrogate"]
    vectors = first.encode(texts, "")
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert len(embedder.asked) == 3
    np.testing.assert_array_equal(stored(embedder, tmp_path).encode(["b", "a"], ""), vectors[[1, 0]])
    assert len(embedder.asked) == 3
    assert (first.encode(["a"], "q: ") != vectors[0]).all()
    first.encode(["a"])
    assert embedder.asked[3:] == [("a", "q: "), ("a", "d: ")]
    assert first.encode([], "").shape == (0, 4)


def test_an_embedder_is_opened_when_it_is_needed_and_not_before(tmp_path: Path) -> None:
    stored(Counting(), tmp_path).encode(["a"], "")
    closed = StoredEmbedder(Counting(), lambda: pytest.fail("opened"), VectorStore(tmp_path))
    assert closed.encode(["a"], "").shape == (1, 4)


def test_what_was_half_written_is_made_again(tmp_path: Path) -> None:
    embedder = Counting()
    stored(embedder, tmp_path).encode(["a", "b"], "")
    (kept,) = tmp_path.iterdir()
    kept.rename(kept.with_name(f".{kept.name}.writing"))  # as a process that was killed before the rename leaves it
    np.testing.assert_array_equal(stored(embedder, tmp_path).encode(["a"], ""), Counting().encode(["a"], ""))
    assert len(embedder.asked) == 3


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".000000-1.vectors.{'0' * 12}.writing"
    left.write_text("half")
    VectorStore(tmp_path)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "noise"])
def test_damaged_vectors_are_a_miss_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    embedder = Counting()
    right = stored(embedder, tmp_path).encode(["a", "b"], "")
    (kept,) = tmp_path.iterdir()
    content = bytearray(kept.read_bytes())
    content[140] ^= 1  # in the first vector
    kept.write_bytes({"flipped": bytes(content), "cut": content[:-70], "emptied": b"", "noise": b"\x93NUMPY" + bytes(300)}[damage])
    np.testing.assert_array_equal(stored(embedder, tmp_path).encode(["a", "b"], ""), right)
    assert len(embedder.asked) == 4
    assert f"{kept}: is damaged" in capsys.readouterr().err


def test_vectors_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "000000-7.npy", np.ones((2, 4), np.float32))
    (tmp_path / "000000-7.keys").write_bytes(key_of("a", "") + key_of("b", ""))
    closed = StoredEmbedder(Counting(), lambda: pytest.fail("opened"), VectorStore(tmp_path))
    assert (closed.encode(["b", "a"], "") == 1).all()


def test_prompt_and_text_do_not_run_into_each_other() -> None:
    assert key_of("b", "a") != key_of("ab", "") != key_of("a", "b")


def test_the_cache_makes_room_by_what_was_used_longest_ago(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE_GB", "2.5e-6")
    for age, name in enumerate(("old", "older", "random")):
        folder = use("random" if name == "random" else "vectors", name)
        (folder / "x").write_bytes(b"0" * 1000)
        os.utime(folder, (1000 - age, 1000 - age))
    (use("vectors", "new") / "x").write_bytes(b"0" * 1000)
    use("vectors", "new")
    assert sorted(path.name for path in cache.glob("*/*")) == ["new", "old", "random"]
