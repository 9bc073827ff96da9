"""Vectors that were made once: each text is embedded once per model and prompt, whichever tasks want it, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from compress.models.embedder import CHUNK_TEXTS, Embedder, Vectors
from compress.models.text.spec import EmbedderSpec

KEY_BYTES = 16


def key_of(text: str, prompt: str) -> bytes:
    """Return what a text is known by under a prompt."""
    return hashlib.blake2b(f"{prompt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class VectorStore:
    """Vectors of one embedder in a folder: files of rows, each beside a file of the rows' keys."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, or make it. What an interrupted writer left half done is passed over."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._arrays: list[Vectors] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        for path in sorted(folder.glob("*.keys")):  # written last, so its vectors are whole
            self._take(path.read_bytes(), np.load(path.with_suffix(".npy"), mmap_mode="r"))

    def __contains__(self, key: bytes) -> bool:
        """Whether a vector is kept under this key."""
        return key in self._rows

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self._rows)

    def get(self, keys: list[bytes]) -> Vectors:
        """Return the vectors of keys that are all there: float32 [keys, dimension]."""
        by_file: dict[int, list[tuple[int, int]]] = {}
        for position, key in enumerate(keys):
            file, row = self._rows[key]
            by_file.setdefault(file, []).append((position, row))
        found = np.empty((len(keys), self._arrays[0].shape[1]), dtype=np.float32)
        for file, pairs in by_file.items():
            positions, rows = np.array(pairs).T
            found[positions] = self._arrays[file][rows]
        return found

    def add(self, keys: list[bytes], vectors: Vectors) -> None:
        """Keep vectors, float32 [keys, dimension], under their keys."""
        stem = self._folder / f"{len(self._arrays):06d}-{os.getpid()}"
        np.save(stem.with_suffix(".npy"), vectors)
        stem.with_suffix(".writing").write_bytes(b"".join(keys))
        stem.with_suffix(".writing").replace(stem.with_suffix(".keys"))
        self._take(b"".join(keys), np.load(stem.with_suffix(".npy"), mmap_mode="r"))

    def _take(self, keys: bytes, vectors: Vectors) -> None:
        file = len(self._arrays)
        self._arrays.append(vectors)
        for row in range(len(keys) // KEY_BYTES):
            self._rows[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (file, row)


class Mapped:
    """An embedder whose vectors go through a function: float32 [n, d] to [n, d]."""

    def __init__(self, embedder: Embedder, function: Callable[[Vectors], Vectors]) -> None:
        self.name, self.spec, self.dimension = embedder.name, embedder.spec, embedder.dimension
        self._embedder, self._function = embedder, function

    def encode(
        self, texts: Iterable[str], prompt: str | None = None, *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Vectors:
        """Embed texts and map their vectors."""
        return self._function(self._embedder.encode(texts, prompt, batch_tokens=batch_tokens, progress=progress))


class Described(Protocol):
    """What is known of an embedder before it is opened: a `ModelFolder`, or an embedder itself."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> EmbedderSpec: ...

    @property
    def dimension(self) -> int: ...


class StoredEmbedder:
    """An embedder that is opened only when a text comes that it was never given; the rest is read from a store."""

    def __init__(
        self,
        model: Described,
        open_embedder: Callable[[], Embedder],
        store: VectorStore,
        batch_tokens: int | None = None,
    ) -> None:
        """Take the model, how it is opened, and where its vectors are kept.

        `batch_tokens`: of every batch, whatever a call says; vectors of one store come from batches of one size.
        """
        self.name, self.spec, self.dimension = model.name, model.spec, model.dimension
        self._open = open_embedder
        self._opened: Embedder | None = None
        self._store = store
        self._batch_tokens = batch_tokens

    def encode(
        self, texts: Iterable[str], prompt: str | None = None, *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Vectors:
        """Embed texts; see `compress.models.embedder.Embedder`. `batch_tokens` is the store's own."""
        del batch_tokens
        prompt = self.spec.default_prompt if prompt is None else prompt
        listed = list(texts)
        all_keys = [key_of(text, prompt) for text in listed]
        missing = {key: text for key, text in zip(all_keys, listed, strict=True) if key not in self._store}
        keys = list(missing)
        if missing and self._opened is None:
            self._opened = self._open()
        for start in range(0, len(keys), CHUNK_TEXTS):  # kept as they come: what a stopped run has made is not made again
            chunk = keys[start : start + CHUNK_TEXTS]
            assert self._opened is not None
            chosen = [missing[key] for key in chunk]
            self._store.add(chunk, self._opened.encode(chosen, prompt, batch_tokens=self._batch_tokens, progress=progress))
        if not listed:
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._store.get(all_keys)

    def close(self) -> None:
        """Let go of the embedder; it is opened again if need be."""
        self._opened = None
