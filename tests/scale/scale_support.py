"""A small static model and texts, for corpora."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
from pyarrow import parquet
from static_support import model2vec_folder, table
from tokenizers import Tokenizer, models, pre_tokenizers

from compress.common.errors import UserError
from compress.scale.encoder import Encoding, Texts, make_encoder

WORDS = ["rain", "evening", "parcel", "never", "came", "wrote", "it", "who", "by", "the"]


def static_model(folder: Path) -> Path:
    """A static table of some words, in the folder of model2vec."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return model2vec_folder(folder, tokenizer, {"embeddings": table(tokenizer)}, normalize=True)


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Texts that differ from their neighbours."""
    return [" ".join(WORDS[(seed + number * step) % 10] for step in range(1, 3 + number % 7)) for number in range(count)]


def write_lines(path: Path, texts: list[str]) -> str:
    """Write a text per line."""
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return str(path)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything that a run left, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def read_parts(folder: Path) -> pyarrow.Table:
    """The rows of all parts."""
    return pyarrow.concat_tables(parquet.read_table(path) for path in sorted(folder.glob("part-*.parquet")))


class Deadly:
    """A worker that dies the first time that it gets certain units; what it is given otherwise, another worker does."""

    def __init__(self, worker: Callable[[object], object], folder: Path, deaths: int) -> None:
        self._worker, self._folder, self._deaths = worker, folder, deaths

    def __call__(self, unit: object) -> object:
        if self._folder.is_dir() and len(list(self._folder.iterdir())) < self._deaths and isinstance(unit, Texts):
            mark = self._folder / hashlib.sha256(repr(unit.texts).encode()).hexdigest()
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self._worker(unit)


def deadly_encoder(how: Encoding) -> Deadly:
    """Make an encoder that dies three times, each time at another unit, if there is a folder to count that in."""
    return Deadly(make_encoder(how), Path(f"{how.model}-deaths"), 3)


def slow_encoder(how: Encoding) -> Callable[[object], object]:
    """Make an encoder that takes a while for each unit."""
    encoder = make_encoder(how)

    def work(unit: object) -> object:
        time.sleep(0.2)
        return encoder(unit)  # type: ignore[arg-type]

    return work


def always_dying() -> Callable[[object], object]:
    """Make a worker that dies of every unit."""
    return lambda unit: os.kill(os.getpid(), signal.SIGKILL)


def failing() -> Callable[[object], object]:
    """Make a worker that cannot do its unit."""

    def work(unit: object) -> object:
        raise UserError(f"unit {unit}: no", "another one")

    return work


def doubling() -> Callable[[int], int]:
    """Make a worker that takes longer for smaller units."""

    def work(unit: int) -> int:
        time.sleep(0.05 * (4 - unit % 5))
        return 2 * unit

    return work
