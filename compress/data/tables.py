"""Rows with named columns from files: JSON lines, CSV, TSV, Parquet. Errors name file and line (of Parquet, row). No torch here."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from compress.common.errors import UserError, rename
from compress.common.inputs import open_file
from compress.data.texts import LONGEST_LINE, iterate_rows, read_lines

Row = tuple[int, dict[str, Any]]
"""The number of a line, of Parquet of a row, from 1, and the values by column."""


def read_table(path: Path, required: Sequence[str] = ()) -> list[Row]:
    """Read a file's rows. Every value of CSV and TSV is a string; JSON lines and Parquet have types of their own.

    Args:
        path: the file; its suffix, one of `SUFFIXES`, says what it is.
        required: columns that it must have.

    Raises:
        UserError: the file cannot be read, is not what its suffix says, lacks a column, or has no rows.
    """
    rows = list(READERS[suffix_of(path)](path, required))
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def suffix_of(path: Path) -> str:
    """Return which of `SUFFIXES` a file has; an empty string for none."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def stem_of(path: Path) -> str:
    """Return a file's name without its suffix, `test` for `test.jsonl.gz`."""
    return path.name.removesuffix(suffix_of(path))


def is_text(path: Path) -> bool:
    """Whether a file's format has no types, so that numbers are written as texts."""
    return suffix_of(path).startswith((".csv", ".tsv"))


def unit_of(path: Path) -> str:
    """Return what the numbers of a file's rows count: lines, of Parquet rows."""
    return "row" if suffix_of(path) == ".parquet" else "line"


def place_of(path: Path, number: int) -> str:
    """Return where a row stands, for errors."""
    return f"{path}, {unit_of(path)} {number}"


def find_table(folder: Path, stem: str) -> Path | None:
    """Return the file `<stem><suffix>` of a folder; None if there is none.

    Raises:
        UserError: there are several, in different formats.
    """
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{found[1]}: there is {found[0].name} too", "keep one of the two")
    return found[0] if found else None


def tables_in(folder: Path) -> dict[str, Path]:
    """Return the files of a folder that are tables, by their stems.

    Raises:
        UserError: see `find_table`.
    """
    stems = sorted({stem_of(path) for path in folder.glob("*") if suffix_of(path) and path.is_file()})
    return {stem: path for stem in stems if (path := find_table(folder, stem)) is not None}


def _check_columns(place: str, names: Sequence[str], required: Iterable[str]) -> None:
    """See that columns are there, once each.

    Raises:
        UserError: one is missing, empty or there twice.
    """
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            raise UserError(f"{place}: column {index + 1} {'has no name' if not name else f'is named {name!r}, as another one is'}")
    missing = next((name for name in required if name not in names), None)
    if missing is not None:
        raise UserError(f"{place}: has no column {missing!r}", rename(missing, [name for name in names if name not in required]))


def _of_json_lines(path: Path, required: Sequence[str]) -> Iterator[Row]:
    return iterate_rows(path, tuple(required))


def _of_csv(separator: str, path: Path, required: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a table whose first line names its columns. A row is named by its first line; values may span several."""
    lines = (f"{line}\n" for _, line in read_lines(path, blank=True))
    csv.field_size_limit(LONGEST_LINE)
    table = csv.reader(lines, delimiter=separator, strict=True)
    begun = 1
    try:
        names = [name.strip() for name in next(table, [])]
        if not names:
            raise UserError(f"{path}: has no rows")
        _check_columns(f"{path}, line 1", names, required)
        while True:
            begun = table.line_num + 1
            row = next(table, None)
            if row is None:
                return
            if row and len(row) != len(names):
                hint = "a value that holds the separator, a quote or a line break stands in quotes"
                raise UserError(f"{path}, line {begun}: has {len(row)} columns, line 1 has {len(names)}", hint)
            if row:
                yield begun, dict(zip(names, row, strict=True))
    except csv.Error as error:
        said = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise UserError(f"{path}, line {begun}: {said}", 'a quote in a quoted value is written twice, ""') from error


def _of_parquet(path: Path, required: Sequence[str]) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    with open_file(path) as file:
        try:
            opened = parquet.ParquetFile(file)
            _check_columns(str(path), opened.schema_arrow.names, required)
            rows = opened.read().to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    yield from enumerate(rows, start=1)


READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".jsonl.gz": _of_json_lines,
    ".jsonl": _of_json_lines,
    ".csv.gz": partial(_of_csv, ","),
    ".csv": partial(_of_csv, ","),
    ".tsv.gz": partial(_of_csv, "\t"),
    ".tsv": partial(_of_csv, "\t"),
    ".parquet": _of_parquet,
}
"""What reads a file of rows, by its suffix."""
SUFFIXES = tuple(READERS)
