"""A corpus becomes parts of vectors: here, or by workers of Ray. A run that was stopped goes on behind its last whole part."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError
from compress.common.files import TEMPORARY, naming, write_json
from compress.common.inputs import read_as
from compress.common.locks import LOCK, locked
from compress.data.corpus import Block, Corpus, Position, open_corpus
from compress.data.rows import Columns
from compress.data.texts import calibration_texts, read_texts
from compress.models.folder import ModelFolder
from compress.models.source import find
from compress.runtimes.encoding import EncodeOptions
from compress.scale.encoder import Describe, Encoding, Facts, Store, Texts, make_encoder
from compress.scale.parts import Layout, NpyArray, ParquetParts, Sink, StoredFacts, facts_as_json, working_folder
from compress.scale.units import Map, RayOptions, working

PART_TEXTS = 32_768
SETTINGS = "_encode.json"
"""What a folder of parts says of the run that writes it."""
SAY_SECONDS = 10.0


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is read, embedded and stored."""

    encode: EncodeOptions = field(default_factory=EncodeOptions)
    columns: Columns = field(default_factory=Columns)
    store: Store = "float32"
    calibration: Path | None = None
    """Texts that ranges (int8) and thresholds (binary) are fitted on; None: the embedded calibration texts."""
    part_texts: int = PART_TEXTS
    """Texts of a part."""
    truncate: bool = True
    """Whether texts that are longer than the model takes are cut; else they are rejected."""


@dataclass(frozen=True)
class Encoded:
    """What became of a corpus."""

    texts: int
    """Vectors."""
    dimension: int
    rejected: int
    parts: int
    continued: int
    """Parts that an earlier run had written."""


class _Settings(BaseModel):
    """What decides the parts of a run, and what is known of its model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decided: dict[str, Any]
    facts: StoredFacts
    done: dict[str, int] | None = None
    """Vectors and rejects, once the corpus is embedded."""


def encode_corpus(
    model: str,
    texts: str,
    target: Path,
    options: CorpusOptions | None = None,
    *,
    ray: RayOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Encoded:
    """Embed a corpus of any size, in the memory of a few parts.

    A part holds a fixed number of records and is embedded by itself, so that what it holds depends neither on where a run was
    stopped nor on which worker did it.

    Args:
        model: as for `compress.load`.
        texts: a file, a folder, a pattern, or a data set of the hub; see `compress.data.corpus.open_corpus`.
        target: a folder, which gets Parquet parts; or a file that ends in `.npy`. What an earlier run wrote there is continued.
        options: None: all defaults.
        ray: who embeds; None: this process.
        say: called with a line about progress every ten seconds.

    Raises:
        UserError: the corpus or the model cannot be read; the target holds something else, or vectors of another model, corpus or
            setting; it is in use; it cannot be written.
    """
    options = options or CorpusOptions()
    if options.part_texts < 1:
        raise UserError(f"--part-texts {options.part_texts}: must be at least 1")
    corpus = open_corpus(texts, options.columns)
    source = find(model)
    decided = _decided(source, corpus, options)
    array = target.suffix.lower() == ".npy"
    folder = working_folder(target) if array else target
    if corpus.passed_over:
        shown = ", ".join(corpus.passed_over[:5]) + (", ..." if len(corpus.passed_over) > 5 else "")
        say(f"{texts}: {len(corpus.passed_over)} files are no texts, and are passed over: {shown}")
    path = Path(model)
    threads = None if ray is None else ray.cpus
    how = Encoding(str(path.resolve()) if path.is_dir() else model, options.encode, options.store, options.truncate, threads)
    with _held(folder, target, texts), working(partial(make_encoder, how), ray) as mapped:
        facts = _facts(folder, decided, options, mapped)
        about = {"model": source.name, "fingerprint": source.fingerprint, "task": options.encode.task or ""}
        layout = Layout(options.store, corpus.integers, facts, about)
        sink: Sink = NpyArray(target, layout, own_ids=corpus.columns.id is not None) if array else ParquetParts(folder, layout)
        encoded = _run(corpus, sink, facts, options, mapped, say)
        if not array:
            _write_settings(folder, decided, facts, encoded)
    if array:
        _remove(folder)
    return encoded


def _run(corpus: Corpus, sink: Sink, facts: Facts, options: CorpusOptions, mapped: Map, say: Callable[[str], None]) -> Encoded:
    """Embed what is not yet written."""
    start = sink.resume()
    waiting: list[Block] = []
    progress = _Progress(corpus, start.parts, say)

    def units(blocks: Iterable[Block]) -> Iterator[Texts]:
        for block in blocks:
            waiting.append(block)
            yield Texts(block.texts, facts)

    blocks = corpus.blocks(options.part_texts, start.parts, Position(*start.next))
    for stored in mapped(units(blocks)):
        block = waiting.pop(0)
        sink.write(block, stored)
        progress.wrote(block)
    done = sink.finish()
    return Encoded(done.texts, facts.dimension, done.rejected, done.parts, start.parts)


def _facts(folder: Path, decided: dict[str, Any], options: CorpusOptions, mapped: Map) -> Facts:
    """Return the facts of an earlier run with the same settings, or ask the model for them.

    Raises:
        UserError: the earlier run had other settings; names the first one.
    """
    path = folder / SETTINGS
    if path.exists():
        earlier = read_as(path, _Settings)
        _check_same(folder, earlier.decided, decided)
        return earlier.facts.facts
    fitted = options.store in ("int8", "binary")
    texts = read_texts(options.calibration) if options.calibration else list(calibration_texts())
    (facts,) = mapped([Describe(texts if fitted else [])])
    assert isinstance(facts, Facts)
    _write_settings(folder, decided, facts, None)
    return facts


def _write_settings(folder: Path, decided: dict[str, Any], facts: Facts, encoded: Encoded | None) -> None:
    done = None if encoded is None else {"texts": encoded.texts, "rejected": encoded.rejected, "parts": encoded.parts}
    write_json(folder / SETTINGS, {"decided": decided, "facts": facts_as_json(facts), "done": done})


def _decided(source: ModelFolder, corpus: Corpus, options: CorpusOptions) -> dict[str, Any]:
    """Return everything that decides a run's parts, by the names that errors use."""
    encode, columns = options.encode, corpus.columns
    return {
        "model": f"{source.name} ({source.fingerprint})",
        "prompt": encode.prompt,
        "task": encode.task,
        "runtime": encode.runtime,
        "device": encode.device,
        "stream": encode.stream,
        "vector format": options.store,
        "calibration": None if options.calibration is None else str(options.calibration),
        "truncation": options.truncate,
        "texts of a part": options.part_texts,
        "column": columns.text,
        "id column": columns.id,
        "input": [file.described for file in corpus.sources],
    }


def _check_same(folder: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """See that a run continues one with the same settings.

    Raises:
        UserError: it does not; names the first setting that differs.
    """
    for name in now:
        before, after = earlier.get(name), now[name]
        if before == after:
            continue
        if name == "input":
            before, after = _first_difference(before or [], after)
        raise UserError(
            f"{folder}: was begun with another {name}: {before}, now {after}",
            "run the command that began it, or give another place for the vectors",
        )


def _first_difference(before: list[Any], after: list[Any]) -> tuple[str, str]:
    """Return the first file that differs in two lists of files, for people."""
    longest = max(len(before), len(after))
    padded = [[*files, *[None] * (longest - len(files))] for files in (before, after)]
    first, second = next((a, b) for a, b in zip(*padded, strict=True) if a != b)
    return tuple("none" if one is None else f"{one['name']} ({one['bytes']:,} bytes, {one['sampled']})" for one in (first, second))  # type: ignore[return-value]


@contextmanager
def _held(folder: Path, target: Path, texts: str) -> Iterator[None]:
    """Make a run's folder and hold it for the block.

    Raises:
        UserError: it holds something else, is within the corpus, or is in use.
    """
    if Path(texts).is_dir() and target.resolve().is_relative_to(Path(texts).resolve()):
        raise UserError(f"{target}: is in the folder of the texts", "give a folder outside of it")
    with naming(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file", "give a folder, or the name of an .npy file")
        others = sorted(path.name for path in folder.iterdir() if not _is_ours(path)) if folder.is_dir() else []
        if others and folder == target and not (folder / SETTINGS).exists():
            raise UserError(f"{folder}: holds other files, such as {others[0]}", "give another folder")
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, str(target), hint="another command is writing it"):
        yield


def _is_ours(path: Path) -> bool:
    return path.name == LOCK or path.name.endswith(TEMPORARY)


def _remove(folder: Path) -> None:
    """Remove the folder in which an array was written."""
    with naming(folder):
        shutil.rmtree(folder)


class _Progress:
    """Says how fast a run is, and how long it will take."""

    def __init__(self, corpus: Corpus, continued: int, say: Callable[[str], None]) -> None:
        self._corpus, self._say = corpus, say
        self._began = self._said = time.perf_counter()
        self._texts = 0
        self._start: float | None = None
        if continued:
            say(f"{corpus.name}: {continued} parts are written; continues behind them")

    def wrote(self, block: Block) -> None:
        """Count a block that was written."""
        now = time.perf_counter()
        self._texts += block.records
        if self._start is None:  # a continued run starts somewhere in the corpus: time is estimated from the blocks after the first
            self._start, self._timed = block.bytes_read, now
        if now - self._said < SAY_SECONDS:
            return
        self._said = now
        share = block.bytes_read / max(1, self._corpus.bytes)
        rate = self._texts / (now - self._began)
        read, taken = block.bytes_read - self._start, now - self._timed
        left = f", {duration((self._corpus.bytes - block.bytes_read) * taken / read)} left" if read > 0 else ""
        self._say(f"part {block.number}: {self._texts:,} texts at {rate:,.0f} a second, {100 * share:.0f} % of the input{left}")


def duration(seconds: float) -> str:
    """Return a time for people, such as `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
