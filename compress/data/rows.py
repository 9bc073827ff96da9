"""Rows of texts from files: lines, JSON lines, tables and Parquet, also compressed, in the memory of a few. No torch here."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from compress.common.errors import UserError, nearest
from compress.common.inputs import open_file
from compress.data.texts import LONGEST_LINE

TEXT = "text"
PACKED = (".gz", ".zst")
BATCH_ROWS = 1_024
"""Rows of a Parquet file or a data set that are in memory as Python objects at a time."""

Id = str | int
Row = tuple[int, Any, Any, str | None]
"""Number in its file, from 1; id; text; why it is none, where the reader knows."""


@dataclass(frozen=True)
class Columns:
    """Where a corpus has its texts and ids."""

    text: str = TEXT
    id: str | None = None
    """None: texts are numbered from 0 in the order of the corpus."""


@dataclass
class Meter:
    """How far a file has been read."""

    at: Callable[[], float] = lambda: 0.0


def kind_of(value: Any) -> str:
    """Return what a value is, for people."""
    return "null" if value is None else type(value).__name__


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


def of_lines(path: Path, columns: Columns, skip: int, meter: Meter) -> Iterator[Row]:
    """Yield the lines of a file as texts, after the first `skip`."""
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
            reason = f"is {kind_of(row)}, not an object"
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
            check_types(path, columns, opened.schema_arrow)
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


def check_types(path: Path | str, columns: Columns, schema: Any) -> None:
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


READERS: Mapping[str, Callable[[Path, Columns, int, Meter], Iterator[Row]]] = {
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
    ".txt": of_lines,
    ".csv": _of_table(","),
    ".tsv": _of_table("\t"),
    ".parquet": _of_parquet,
}
"""What reads a file, by its suffix; one with another suffix holds a text per line. All but `.parquet` may be .gz or .zst."""
