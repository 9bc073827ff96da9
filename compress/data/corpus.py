"""Corpora: the texts of many files, one after the other, in the memory of a block of them. No torch here.

What is no text (bad UTF-8, null, a broken line) is handed on as a reject with its place and reason, so that one line among a
hundred million does not end a run of days. What is wrong with a whole file is an error.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from compress.common.errors import UserError
from compress.common.inputs import open_file
from compress.data.rows import BATCH_ROWS, PACKED, READERS, Columns, Id, Meter, Row, check_types, kind_of, of_lines
from compress.data.texts import HUB, OTHER_FORMATS, SURROGATE, fault_of_hub, is_hub, keep_to_endpoint

SAMPLES, SAMPLE_BYTES = 16, 65_536
_LARGEST_ID = 2**63 - 1


def is_corpus(texts: str, to: str) -> bool:
    """Whether only a corpus has such texts or such a target: folders, a pattern, a .zst file."""
    path = Path(texts)
    return (
        to.endswith("/")
        or path.is_dir()
        or path.suffix.lower() == ".zst"
        or (not path.exists() and glob.has_magic(texts) and not is_hub(texts))
    )


class Position(NamedTuple):
    """A place between two records of a corpus."""

    file: int
    """Number of the file, from 0."""
    rows: int
    """Records of that file before the place."""


START = Position(0, 0)


class Reject(NamedTuple):
    """A record that has no vector."""

    id: Id | None
    place: str
    reason: str


@dataclass
class Block:
    """Some consecutive records of a corpus."""

    number: int
    ids: list[Id] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    """The line or row of each text in its file."""
    files: list[tuple[int, str]] = field(default_factory=list)
    """From which text on the texts are of which file."""
    rejects: list[tuple[int, Reject]] = field(default_factory=list)
    """Records that are no texts, each with the number of texts before it."""
    records: int = 0
    """Texts and rejects."""
    next: Position = START
    """Where the next block starts."""
    bytes_read: float = 0.0
    """Bytes of the corpus up to the end of the block, about."""

    def place(self, index: int) -> str:
        """Return where a text stands, for people."""
        name = next(name for first, name in reversed(self.files) if first <= index)
        return _place(name, self.numbers[index])


@dataclass(frozen=True)
class Source:
    """A file of a corpus, or a data set of the hub."""

    name: str
    """As places name it: the path below the corpus's folder."""
    bytes: int
    sampled: str
    """A hash of pieces of the content; tells a changed file from the same one without reading all of it."""
    rows: Callable[[Columns, int, Meter], Iterator[Row]] = field(repr=False, compare=False)
    """Yields the rows after the first so many."""

    @property
    def described(self) -> dict[str, Any]:
        """What a run records of it."""
        return {"name": self.name, "bytes": self.bytes, "sampled": self.sampled}


@dataclass(frozen=True)
class Corpus:
    """Files of texts in a fixed order."""

    name: str
    sources: tuple[Source, ...]
    columns: Columns
    integers: bool
    """Whether ids are integers; else they are strings."""
    passed_over: tuple[str, ...] = ()
    """Files of the corpus's folder that hold no texts, by their names."""

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(source.bytes for source in self.sources)

    def blocks(self, size: int, number: int = 0, start: Position = START) -> Iterator[Block]:
        """Yield blocks of `size` records, the last one of fewer.

        Args:
            size: records of a block.
            number: number of the first block, which says how many records are before it.
            start: where it starts.

        Raises:
            UserError: a file cannot be read, or its first record lacks a column.
        """
        before = sum(source.bytes for source in self.sources[: start.file])
        block = Block(number)
        for index, source in enumerate(self.sources[start.file :], start=start.file):
            taken = start.rows if index == start.file else 0
            meter = Meter()
            rows = source.rows(self.columns, taken, meter)
            while True:
                room = size - block.records
                block.files.append((len(block.texts), source.name))
                found = self._fill(block, islice(rows, room), source.name, number * size)
                taken += found
                if found < room:
                    break
                block.next, block.bytes_read = Position(index, taken), before + meter.at()
                yield block
                number += 1
                block = Block(number)
            before += source.bytes
        if block.records:
            block.next, block.bytes_read = Position(len(self.sources), 0), float(self.bytes)
            yield block

    def _fill(self, block: Block, rows: Iterable[Row], name: str, first: int) -> int:
        """Add rows to a block; return how many there were."""
        own = self.columns.id is None
        found = 0
        for number, id, text, reason in rows:
            found += 1
            if own:
                id = first + block.records
            elif reason is None:
                reason = self._fault_of_id(id)
                id = None if reason else id
            block.records += 1
            reason = reason or _fault_of_text(text)
            if reason is None:
                block.ids.append(id)
                block.texts.append(text)
                block.numbers.append(number)
            else:
                block.rejects.append((len(block.texts), Reject(id, _place(name, number), reason)))
        return found

    def _fault_of_id(self, id: Any) -> str | None:
        if self.integers:
            if isinstance(id, int) and not isinstance(id, bool):
                return None if -_LARGEST_ID <= id <= _LARGEST_ID else "its id is no integer of 64 bits"
            return f"its id is {kind_of(id)}, the first one is an integer"
        if not isinstance(id, str):
            return f"its id is {kind_of(id)}, the first one is a string"
        return None if id.isascii() or SURROGATE.search(id) is None else "its id is not UTF-8"


def open_corpus(texts: str, columns: Columns) -> Corpus:
    """Find the files of a corpus and see what its ids are.

    Args:
        texts: a file, a folder, a pattern such as `texts/*.jsonl.zst`, or `hub:OWNER/NAME:COLUMN[:SPLIT]`.
        columns: where texts and ids are. Without an id column texts are numbered.

    Raises:
        UserError: there are no such files, their format is not read, or the first record of one lacks a column.
    """
    passed_over: tuple[str, ...] = ()
    if is_hub(texts):
        columns, source = _hub_source(texts, columns)
        sources = [source]
    else:
        root, paths, passed_over = find_files(texts)
        sources = [_file_source(path, str(path.relative_to(root))) for path in paths]
    integers = True
    if columns.id is not None:
        first = next((row for source in sources for row in source.rows(columns, 0, Meter()) if row[1] is not None), None)
        integers = first is not None and isinstance(first[1], int) and not isinstance(first[1], bool)
    return Corpus(texts, tuple(sources), columns, integers, passed_over)


def find_files(texts: str) -> tuple[Path, list[Path], tuple[str, ...]]:
    """Return the folder of the files that a path or a pattern names; the files in order; names of others in that folder.

    Raises:
        UserError: there are none.
    """
    path = Path(texts)
    if path.is_dir():
        below = sorted(found for found in path.rglob("*") if found.is_file())
        seen = [found for found in below if not any(part.startswith((".", "_")) for part in found.relative_to(path).parts)]
        chosen = [found for found in seen if _suffix(found) in READERS]
        others = tuple(str(found.relative_to(path)) for found in seen if found not in set(chosen))
        if not chosen:
            hint = f"texts come as {', '.join(READERS)}; .gz and .zst are read too"
            raise UserError(f"{path}: the folder holds no files of texts", hint)
        return path, chosen, others
    if not path.exists() and glob.has_magic(texts):
        found_by_pattern = sorted(Path(name) for name in _matching(texts) if Path(name).is_file())
        if not found_by_pattern:
            raise UserError(f"{texts}: no file matches")
        return Path(os.path.commonpath([found.parent for found in found_by_pattern])), found_by_pattern, ()
    return path.parent, [path], ()


def _matching(pattern: str) -> Iterator[str]:
    """Yield what a pattern matches; `**` matches folders of any depth."""
    yield from glob.iglob(pattern, recursive=True)  # noqa: PTH207 (a pattern may begin anywhere, and `Path.glob` only below a folder)


def _suffix(path: Path) -> str:
    """Return the suffix that says a file's format, without that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _file_source(path: Path, name: str) -> Source:
    """Describe a file; raises a UserError where its format is not read or it cannot be opened."""
    suffix = _suffix(path)
    if suffix == ".json":
        raise UserError(f"{path}: a JSON list is read whole, and a corpus is not", "write an object per line (.jsonl)")
    if suffix in OTHER_FORMATS or (suffix == ".parquet" and path.suffix.lower() in PACKED):
        raise UserError(f"{path}: {path.suffix} files are not read", f"texts come as {', '.join(READERS)}, or one per line (.txt)")
    reader = READERS.get(suffix, of_lines)
    with open_file(path) as file:
        size, sampled = _sampled(file)
    return Source(name, size, sampled, lambda columns, skip, meter: reader(path, columns, skip, meter))


def _sampled(file: IO[bytes]) -> tuple[int, str]:
    """Return a file's size and a hash of it and of evenly spaced pieces, its first and last bytes among them."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    for start in sorted({last * piece // (SAMPLES - 1) for piece in range(SAMPLES)}):
        file.seek(start)
        digest.update(file.read(SAMPLE_BYTES))
    return size, digest.hexdigest()[:16]


def _place(name: str, number: int) -> str:
    return f"{name}, {'row' if name.endswith('.parquet') or is_hub(name) else 'line'} {number}"


def _fault_of_text(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"is {kind_of(text)}, not a string"
    if not text.isascii() and (found := SURROGATE.search(text)):
        half = found.group(0)
        return "is not UTF-8" if "\udc80" <= half <= "\udcff" else f"holds half of a surrogate pair, {half!r}"
    return None


def _hub_source(texts: str, columns: Columns) -> tuple[Columns, Source]:
    """Open a data set of the hub, which lies in files that are mapped, not read; return the columns that are read of it.

    Raises:
        UserError: it cannot be loaded, or has no such columns.
    """
    from datasets import load_dataset

    keep_to_endpoint()
    name, _, rest = texts.removeprefix(HUB).partition(":")
    column, _, split = rest.partition(":")
    if not name:
        raise UserError(f"{texts}: name a data set on the hub as {HUB}OWNER/NAME[:COLUMN[:SPLIT]]")
    columns = Columns(column or columns.text, columns.id)
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # of many kinds, from many libraries: whatever it is, the user is told and the run ends
        reason, token = fault_of_hub(error)
        raise UserError(f"{texts}: cannot be loaded ({reason})", token) from error
    return columns, dataset_source(texts, rows, columns)


def dataset_source(name: str, rows: Any, columns: Columns) -> Source:
    """Describe a `datasets.Dataset` as a source of texts; its bytes are its rows."""
    check_types(name, columns, rows.features.arrow_schema)
    wanted = [column for column in dict.fromkeys((columns.text, columns.id)) if column is not None]
    chosen = rows.select_columns(wanted)
    total = len(chosen)
    sampled = chosen[sorted({(total - 1) * piece // (SAMPLES - 1) for piece in range(SAMPLES)})] if total else {}
    digest = hashlib.sha256(json.dumps([total, sampled], sort_keys=True).encode()).hexdigest()[:16]

    def read(columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
        for start in range(skip, total, BATCH_ROWS):
            batch = chosen[start : start + BATCH_ROWS]
            meter.at = lambda start=start: float(start)  # type: ignore[misc]
            texts = batch[columns.text]
            ids = texts if columns.id is None else batch[columns.id]
            for number, (id, text) in enumerate(zip(ids, texts, strict=True), start=start + 1):
                yield number, id, text, None

    return Source(name, total, digest, read)
