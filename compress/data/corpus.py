"""Corpora: the texts of many files, one after the other, in the memory of a block of them. No torch here.

What is no text (bad UTF-8, null, a broken line) is handed on as a reject with its place and reason, so that one line among a
hundred million does not end a run of days. What is wrong with a whole file is an error.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from compress.common.errors import UserError, nearest
from compress.common.inputs import open_file
from compress.data.texts import HUB, LONGEST_LINE, OTHER_FORMATS, SURROGATE, fault_of_hub, is_hub, keep_to_endpoint

TEXT, ID = "text", "id"
PACKED = (".gz", ".zst")
BATCH_ROWS = 1_024
"""Rows of a Parquet file or a data set that are in memory as Python objects at a time."""
SAMPLES, SAMPLE_BYTES = 16, 65_536
_LARGEST_ID = 2**63 - 1

Id = str | int
Row = tuple[int, Any, Any, str | None]
"""Number in its file, from 1; id; text; why it is none, where the reader knows."""


@dataclass(frozen=True)
class Columns:
    """Where a corpus has its texts and ids."""

    text: str = TEXT
    id: str | None = None
    """None: texts are numbered from 0 in the order of the corpus."""


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


@dataclass
class Meter:
    """How far a file has been read."""

    at: Callable[[], float] = lambda: 0.0


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
            return f"its id is {_kind(id)}, the first one is an integer"
        if not isinstance(id, str):
            return f"its id is {_kind(id)}, the first one is a string"
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
    reader = READERS.get(suffix, _of_lines)
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


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _fault_of_text(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"is {_kind(text)}, not a string"
    if not text.isascii() and (found := SURROGATE.search(text)):
        half = found.group(0)
        return "is not UTF-8" if "\udc80" <= half <= "\udcff" else f"holds half of a surrogate pair, {half!r}"
    return None


class _Unpacked:
    """A file's content, decompressed by what its name says."""

    def __init__(self, path: Path, meter: Meter) -> None:
        self._path, self._meter = path, meter

    def __enter__(self) -> IO[bytes]:
        self._opened = open_file(self._path)
        raw = self._opened.__enter__()
        self._meter.at = lambda: 0.0 if raw.closed else float(raw.tell())
        packed = self._path.suffix.lower()
        if packed == ".gz":
            return gzip.open(raw)  # type: ignore[return-value]
        if packed == ".zst":
            import pyarrow  # type: ignore[import-untyped]

            return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), 1 << 20)
        return raw

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._opened.__exit__(kind, error, trace)
        if isinstance(error, (OSError, EOFError, zlib.error)):
            raise UserError(f"{self._path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _raw_lines(path: Path, skip: int, meter: Meter) -> Iterator[tuple[int, bytes | None]]:
    """Yield lines with their numbers from 1, after the first `skip`; None for one that is too long."""
    with _Unpacked(path, meter) as file:
        number = 0
        while line := file.readline(LONGEST_LINE):
            number += 1
            whole: bytes | None = line
            while line and len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                whole, line = None, file.readline(LONGEST_LINE)
            if number > skip:
                yield number, whole.removeprefix(b"\xef\xbb\xbf") if number == 1 and whole is not None else whole


def _decoded(line: bytes | None) -> tuple[str, str | None]:
    """Return a line without its end, and why it is no text."""
    if line is None:
        return "", f"is longer than {LONGEST_LINE:,} bytes"
    try:
        return line.decode().rstrip("\n").removesuffix("\r"), None
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 ({error.reason} at byte {error.start})"


def _of_lines(path: Path, columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
    if columns.text != TEXT or columns.id is not None:
        raise UserError(f"{path}: lines of text have no columns", "leave out --column and --id-column, or write .jsonl or .csv")
    for number, line in _raw_lines(path, skip, meter):
        text, reason = _decoded(line)
        yield number, None, text, reason


def _of_json_lines(path: Path, columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
    seen = 0
    for number, raw in _raw_lines(path, 0, meter):
        if raw is not None and not raw.strip():
            continue
        seen += 1
        if seen <= skip:
            continue
        line, reason = _decoded(raw)
        row: Any = None
        if reason is None:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = f"is not JSON: {error}"
        if reason is None and not isinstance(row, dict):
            reason = f"is {_kind(row)}, not an object"
        if reason is not None:
            yield number, None, None, reason
            continue
        missing = [name for name in (columns.text, columns.id) if name is not None and name not in row]
        if missing and seen == 1:
            raise _no_column(path, missing[0], row)
        reason = f"lacks {missing[0]!r}" if missing else None
        yield number, row.get(columns.id), row.get(columns.text), reason


def _no_column(path: Path | str, name: str, names: Iterable[str]) -> UserError:
    return UserError(f"{path}: has no column {name!r}", f"{nearest(name, names)} (--column, --id-column)")


def _of_table(separator: str) -> Callable[[Path, Columns, int, Meter], Iterator[Row]]:
    """Return what reads a table whose first line names its columns."""

    def read(path: Path, columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
        csv.field_size_limit(LONGEST_LINE)
        with _Unpacked(path, meter) as file:
            lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            table = csv.reader(lines, delimiter=separator, strict=True)
            try:
                names = next(table, [])
                places = [_column(path, name, names) for name in (columns.text, columns.id) if name is not None]
                for found in islice((row for row in table if row), skip, None):
                    fits = len(found) == len(names)
                    reason = None if fits else f"has {len(found)} columns, line 1 has {len(names)}"
                    text, id = (found[places[0]], found[places[-1]]) if fits else (None, None)
                    yield table.line_num, id, text, reason
            except csv.Error as error:
                raise UserError(f"{path}, line {table.line_num}: {error}") from error

    return read


def _column(path: Path, name: str, names: list[str]) -> int:
    if names.count(name) != 1:
        raise _no_column(path, name, names)
    return names.index(name)


def _of_parquet(path: Path, columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            opened = parquet.ParquetFile(file)
            _check_types(path, columns, opened.schema_arrow)
            wanted = [name for name in dict.fromkeys((columns.text, columns.id)) if name is not None]
            total, group, number = max(1, opened.metadata.num_rows), 0, 0
            while group < opened.num_row_groups and number + opened.metadata.row_group(group).num_rows <= skip:
                number += opened.metadata.row_group(group).num_rows
                group += 1
            meter.at = lambda: size * number / total
            groups = list(range(group, opened.num_row_groups))
            for batch in opened.iter_batches(BATCH_ROWS, row_groups=groups, columns=wanted) if groups else ():
                texts = _values(batch.column(columns.text))
                ids = texts if columns.id is None else _values(batch.column(columns.id))
                for id, text in zip(ids, texts, strict=True):
                    number += 1
                    if number > skip:
                        yield number, id, text, None
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _check_types(path: Path | str, columns: Columns, schema: Any) -> None:
    """See that the columns are there, texts strings, and ids strings or integers."""
    from pyarrow import types

    for name in (columns.text, columns.id):
        if name is None:
            continue
        if schema.names.count(name) != 1:
            raise _no_column(path, name, schema.names)
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if not text and not (name == columns.id and types.is_integer(kind)):
            raise UserError(
                f"{path}: column {name!r} is {kind}, not {'strings' if name == columns.text else 'strings or integers'}"
            )


def _values(column: Any) -> list[Any]:
    """Return a column's values; what is not UTF-8 keeps its bytes as halves of surrogate pairs, as Python does in file names."""
    try:
        found: list[Any] = column.to_pylist()
        return found
    except UnicodeDecodeError:
        import pyarrow

        plain = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        values = plain.cast(pyarrow.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in values]


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
    _check_types(name, columns, rows.features.arrow_schema)
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


READERS: Mapping[str, Callable[[Path, Columns, int, Meter], Iterator[Row]]] = {
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
    ".txt": _of_lines,
    ".csv": _of_table(","),
    ".tsv": _of_table("\t"),
    ".parquet": _of_parquet,
}
"""What reads a file, by its suffix; one with another suffix holds a text per line. All but `.parquet` may be .gz or .zst."""
