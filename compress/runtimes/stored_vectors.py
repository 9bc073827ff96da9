"""Stores vectors on disk, so that each text is embedded once per model and prompt, no matter how many tasks use it."""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from compress.common.errors import UserError
from compress.common.files import naming, remove_abandoned_files, replacing
from compress.models.embedder import CHUNK_TEXTS, Embedder, Vectors
from compress.models.text.spec import EmbedderSpec
from compress.runtimes.routed import Routed

KEY_BYTES, DIGEST_BYTES = 16, 32
MAGIC = b"vectors, checked"
"""What stands before the checksum."""
SUFFIX = ".vectors"


def key_of(text: str, prompt: str) -> bytes:
    """Return the key of a text with a prompt: a BLAKE2b hash of `KEY_BYTES` bytes."""
    return hashlib.blake2b(f"{prompt}\0{text}".encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


class VectorStore:
    """The stored vectors of one embedder, in files of a folder; see `read_vectors`."""

    def __init__(self, folder: Path) -> None:
        """Open a folder, or create it. A damaged file is left out, and that is said."""
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_abandoned_files(folder)
        self._folder = folder
        self._arrays: list[Vectors] = []
        self._rows: dict[bytes, tuple[int, int]] = {}
        for path in stored_in(folder):
            try:
                self._take(*read_vectors(path))
            except FileNotFoundError:  # another process has just removed it, to make room
                continue
            except ValueError as error:
                print(f"{path}: is damaged ({error}); its vectors are computed again", file=sys.stderr, flush=True)

    def __contains__(self, key: bytes) -> bool:
        """Whether a vector is stored under this key."""
        return key in self._rows

    def __len__(self) -> int:
        """Number of vectors."""
        return len(self._rows)

    def get(self, keys: list[bytes]) -> Vectors:
        """Return the vectors of the keys, float32 [keys, dimension].

        Raises:
            KeyError: a key is not stored.
        """
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
        """Store vectors, float32 [keys, dimension], under their keys.

        Raises:
            UserError: they cannot be written.
        """
        # Random, because two containers that share the cache may have the same process number.
        path = self._folder / f"{len(self._arrays):06d}-{secrets.token_hex(8)}{SUFFIX}"
        with naming(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)  # another process may have removed it, to make room
        joined = b"".join(keys)
        with replacing(path) as temporary, temporary.open("w+b") as file:
            np.save(file, vectors)
            length = file.tell()
            file.write(joined)
            file.flush()
            digest = _digest(file, length + len(joined))
            file.seek(0, os.SEEK_END)
            file.write(MAGIC + digest)
        self._take(joined, np.load(path, mmap_mode="r"))

    def _take(self, keys: bytes, vectors: Vectors) -> None:
        if self._arrays and vectors.shape[1] != self._arrays[0].shape[1]:
            raise ValueError(f"{vectors.shape[1]} dimensions, not {self._arrays[0].shape[1]}")
        file = len(self._arrays)
        self._arrays.append(vectors)
        for row in range(len(keys) // KEY_BYTES):
            self._rows[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = (file, row)


def stored_in(folder: Path) -> list[Path]:
    """Return the files of a store; of those that earlier versions wrote in pairs, the one of the keys."""
    return sorted([*folder.glob(f"*{SUFFIX}"), *folder.glob("*.keys")])


def read_vectors(path: Path) -> tuple[bytes, Vectors]:
    """Read the keys of a file, and map its vectors.

    A file is a `.npy` file, float32 [n, dimension], then n keys, then a mark and the BLAKE2b of everything before the mark. Earlier
    versions wrote the keys to a file of their own next to the `.npy` file, without a checksum.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is damaged.
    """
    if path.suffix != SUFFIX:
        keys, vectors = path.read_bytes(), _mapped(path.with_suffix(".npy"))
        if len(vectors) * KEY_BYTES != len(keys):
            raise ValueError(f"{len(keys) / KEY_BYTES:g} keys for {len(vectors)} vectors")
        return keys, vectors
    trailer = len(MAGIC) + DIGEST_BYTES
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - trailer))
        mark = file.read(trailer)
        if not mark.startswith(MAGIC) or _digest(file, size - trailer) != mark[len(MAGIC) :]:
            raise ValueError("its checksum differs")
        vectors = _mapped(path)
        file.seek(size - trailer - len(vectors) * KEY_BYTES)
        return file.read(len(vectors) * KEY_BYTES), vectors


def _mapped(path: Path) -> Vectors:
    try:
        vectors: Vectors = np.load(path, mmap_mode="r")
    except (EOFError, SyntaxError) as error:  # of a header that is none
        raise ValueError("no array") from error
    if vectors.dtype != np.float32 or vectors.ndim != 2:
        raise ValueError(f"{vectors.dtype} {list(vectors.shape)} instead of float32 [n, dimension]")
    return vectors


def _digest(file: IO[bytes], length: int) -> bytes:
    """Return the BLAKE2b of the first `length` bytes of a file."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.digest()


class Mapped:
    """An embedder that applies a function to the vectors of another one."""

    def __init__(self, embedder: Embedder, function: Callable[[Vectors], Vectors]) -> None:
        """Wrap an embedder; `function` maps float32 [n, dimension] to the same shape."""
        self.name, self.spec, self.dimension = embedder.name, embedder.spec, embedder.dimension
        self._embedder, self._function = embedder, function

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts and map their vectors."""
        return self._function(self._embedder.encode(texts, prompt, task=task, batch_tokens=batch_tokens, progress=progress))


class Described(Protocol):
    """The facts about an embedder that are known before it is opened. A `ModelFolder` has them, and so does an embedder."""

    @property
    def name(self) -> str: ...

    @property
    def spec(self) -> EmbedderSpec: ...

    @property
    def dimension(self) -> int: ...


class StoredEmbedder:
    """An embedder that reads vectors from a store, and opens its model only for texts that are not stored yet."""

    def __init__(
        self,
        model: Described,
        open_embedder: Callable[[], Embedder],
        store: VectorStore,
        batch_tokens: int | None = None,
    ) -> None:
        """Combine a model with a store.

        Args:
            model: the model's name, spec and dimension.
            open_embedder: a function that opens the model.
            store: the store of the model's vectors.
            batch_tokens: largest number of padded tokens in a batch; None for the embedder's default. It overrides that of
                `encode`, so that all vectors of a store come from batches of the same size.
        """
        self.name, self.spec, self.dimension = model.name, model.spec, model.dimension
        self._open = open_embedder
        self._opened: Embedder | None = None
        self._store = store
        self._batch_tokens = batch_tokens

    def encode(
        self,
        texts: Iterable[str],
        prompt: str | None = None,
        *,
        task: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
    ) -> Vectors:
        """Embed texts; see `compress.models.embedder.BatchedEmbedder.encode`. `batch_tokens` is ignored: the store fixes it."""
        del batch_tokens
        prompt = self.spec.prompt(prompt, task)
        listed = list(texts)
        all_keys = [key_of(text, prompt) for text in listed]
        missing = {key: text for key, text in zip(all_keys, listed, strict=True) if key not in self._store}
        keys = list(missing)
        if missing and self._opened is None:
            self._opened = self._open()
            if isinstance(self._opened, Routed):
                raise UserError(
                    f"model {self.name!r}: its vectors depend on the task, and the store keeps one for each text and prompt"
                )
        for start in range(0, len(keys), CHUNK_TEXTS):  # stored after each chunk, so that a run that is killed loses at most one
            chunk = keys[start : start + CHUNK_TEXTS]
            assert self._opened is not None
            chosen = [missing[key] for key in chunk]
            self._store.add(chunk, self._opened.encode(chosen, prompt, batch_tokens=self._batch_tokens, progress=progress))
        if not listed:
            return np.empty((0, self.dimension), dtype=np.float32)
        return self._store.get(all_keys)

    def close(self) -> None:
        """Release the embedder. It is opened again when needed."""
        self._opened = None
