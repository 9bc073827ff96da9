"""Texts from files: JSON, tables and plain text, gzipped or not; errors name file and line. No torch here."""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.errors import UserError, nearest, rename
from compress.common.inputs import open_file, parse_json

SUITE = Path(str(resources.files("compress.data"))) / "suite"
CALIBRATION = SUITE.with_name("calibration.jsonl")
# Longest text of `mixed_texts` in words: about 250 tokens, where a MiniLM truncates.
LONGEST_WORDS = 190
HUB = "hub:"
LONGEST_LINE = 2**26
"""Characters of a line from which on a file is not one of texts."""
SURROGATE = re.compile(r"[\ud800-\udfff]")


@contextmanager
def _text_file(path: Path) -> Iterator[io.TextIOWrapper]:
    """Open a UTF-8 text file, gzipped or not; a byte order mark at its start is dropped."""
    with open_file(path) as file, gzip.open(file) if path.suffix.lower() == ".gz" else nullcontext(file) as content:
        yield io.TextIOWrapper(content, encoding="utf-8-sig")  # type: ignore[arg-type]


def read_lines(path: Path, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, gzipped or not, with their numbers from 1.

    Args:
        path: the file.
        blank: whether lines without any text are yielded too.

    Raises:
        UserError: the file is missing or no regular one, is not UTF-8, is not valid gzip, or has a line of 64 M characters.
    """
    number = 1
    try:
        with _text_file(path) as file:
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{path}, line {number}: longer than {LONGEST_LINE:,} characters")
                if blank or line.strip():
                    yield number, line.rstrip("\n")
                number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})", "save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_rows(path: Path, required: tuple[str, ...] = ()) -> list[tuple[int, dict[str, Any]]]:
    """Read JSON lines with their numbers from 1.

    Raises:
        UserError: a line is not a JSON object, lacks a required key or holds NaN, or there are no rows; names file and line.
    """
    return list(iterate_rows(path, required))


def iterate_rows(path: Path, required: tuple[str, ...] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield JSON lines with their numbers from 1, one by one; see `read_rows`."""
    number = 0
    for number, line in read_lines(path):
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        missing = [key for key in required if key not in row]
        if missing:
            hint = rename(missing[0], [key for key in row if key not in required])
            raise UserError(f"{path}, line {number}: lacks {missing[0]!r}; it has {', '.join(sorted(row))}", hint)
        yield number, row
    if not number:
        raise UserError(f"{path}: has no rows")


def read_jsonl(path: Path, required: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Read JSON lines; see `read_rows`."""
    return [row for _, row in read_rows(path, required)]


def check_text(value: Any, place: str) -> str:
    """Return a value that must be a text.

    Raises:
        UserError: it is none, or holds half of a surrogate pair, which JSON can write and no encoding of texts has.
    """
    if not isinstance(value, str):
        raise UserError(f"{place} is {'null' if value is None else type(value).__name__}, not a string")
    if not value.isascii() and (found := SURROGATE.search(value)):
        raise UserError(f"{place} holds half of a surrogate pair, {found.group(0)!r}", "join the two halves, or remove it")
    return value


def is_hub(source: Path | str) -> bool:
    """Whether a source of texts names a dataset on the hub, not a file."""
    return str(source).startswith(HUB)


def read_texts(source: Path | str, *, rows: bool = False) -> list[str]:
    """Read texts: the `text` of each row of JSON lines, a JSON list, a table or a parquet file, the lines of another file, or a
    dataset of the hub.

    Args:
        source: a path, or `hub:OWNER/NAME:COLUMN[:SPLIT]`; the split defaults to `train`.
        rows: whether a blank line is an empty text, so that texts and lines have the same numbers; otherwise it is passed over.

    Raises:
        UserError: the source cannot be read, or does not hold text.
    """
    if is_hub(source):
        return _hub_texts(str(source))
    path = Path(source)
    return list(_reader(path)(path, rows))


def iterate_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file one by one, a blank line as an empty text; see `read_texts`. Lines take the memory of one."""
    yield from _reader(path)(path, True)


def _reader(path: Path) -> Callable[[Path, bool], Iterable[str]]:
    """Return what reads a file of texts, by its name.

    Raises:
        UserError: the name is that of a format that is not read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    last = (suffixes[:-1] if suffixes[-1:] == [".gz"] else suffixes)[-1:]
    suffix = last[0] if last else ""
    if suffix in OTHER_FORMATS:
        raise UserError(f"{path}: {suffix} files are not read", f"texts come as {', '.join(READERS)}, or one per line (.txt)")
    return READERS.get(suffix, _of_lines)


def _of_lines(path: Path, rows: bool) -> Iterator[str]:
    return (line for _, line in read_lines(path, blank=rows))


def _of_json_lines(path: Path, rows: bool) -> Iterator[str]:
    return (check_text(row["text"], f"{path}, line {number}: 'text'") for number, row in iterate_rows(path, ("text",)))


def _of_json(path: Path, rows: bool) -> list[str]:
    """Read a list of strings, or of objects with a `text`."""
    content = parse_json("\n".join(line for _, line in read_lines(path, blank=True)), str(path))
    if not isinstance(content, list):
        raise UserError(f"{path}: must hold a list of texts, this is a {type(content).__name__}", "an object per line is .jsonl")
    found = []
    for number, item in enumerate(content):
        if isinstance(item, dict) and "text" not in item:
            raise UserError(f"{path}: {number}: lacks 'text'; it has {', '.join(sorted(item))}")
        found.append(check_text(item["text"] if isinstance(item, dict) else item, f"{path}: {number}"))
    return found


def _of_table(separator: str) -> Callable[[Path, bool], list[str]]:
    """Return what reads the column `text` of a table whose first line names its columns."""

    def read(path: Path, rows: bool) -> list[str]:
        lines = (f"{line}\n" for _, line in read_lines(path, blank=True))
        csv.field_size_limit(LONGEST_LINE)
        table = csv.reader(lines, delimiter=separator, strict=True)
        try:
            names = next(table, [])
            if names.count("text") != 1:
                raise UserError(f"{path}, line 1: has no column 'text'", f"its columns: {', '.join(names)[:200] or 'none'}")
            place, found = names.index("text"), []
            for row in table:
                if row and len(row) != len(names):
                    raise UserError(f"{path}, line {table.line_num}: has {len(row)} columns, line 1 has {len(names)}")
                found += [row[place]] if row else [""] if rows and len(names) == 1 else []
        except csv.Error as error:
            raise UserError(f"{path}, line {table.line_num}: {error}") from error
        return found

    return read


def _of_parquet(path: Path, rows: bool) -> list[str]:
    """Read the column `text`."""
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    with open_file(path) as file:
        try:
            opened = parquet.ParquetFile(file)
            names = opened.schema_arrow.names
            if "text" not in names:
                raise UserError(f"{path}: has no column 'text'", f"its columns: {', '.join(names)[:200] or 'none'}")
            values = opened.read(columns=["text"]).column("text").to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    return [check_text(value, f"{path}, row {number}: 'text'") for number, value in enumerate(values, start=1)]


READERS: Mapping[str, Callable[[Path, bool], Iterable[str]]] = {
    ".jsonl": _of_json_lines,
    ".ndjson": _of_json_lines,
    ".json": _of_json,
    ".csv": _of_table(","),
    ".tsv": _of_table("\t"),
    ".parquet": _of_parquet,
}
"""What reads a file of texts, by its suffix; a name with another one holds a text per line. All but `.parquet` may be gzipped."""
OTHER_FORMATS = frozenset(
    f".{name}"
    for names in (
        "arrow avro feather h5 hdf5 npy npz orc bin pickle pkl pt safetensors db sqlite",
        "doc docx html ipynb odt pdf rtf xls xlsx xml yaml yml",
        "bz2 lz4 tar tgz xz zip zst",
    )
    for name in names.split()
)
"""Suffixes of formats whose lines are no texts."""


def keep_to_endpoint() -> None:
    """Let `datasets` ask nobody but the hub that HF_ENDPOINT names, where that is a mirror or a company's own.

    Otherwise it counts every loading on a server of Hugging Face, by the data set's name, and waits for that in a closed network.
    """
    from datasets import config

    if "HF_ENDPOINT" in os.environ:
        config.HF_UPDATE_DOWNLOAD_COUNTS = False


def fault_of_hub(error: Exception) -> tuple[str, str]:
    """Return why a data set of the hub was not loaded, in one line, and what mends it where that is a token."""
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
    refused = any(word in reason for word in ("access", "401", "403"))
    return reason, "a private or gated data set needs a token: `hf auth login`, or HF_TOKEN" if refused else ""


def _hub_texts(source: str) -> list[str]:
    from datasets import load_dataset

    keep_to_endpoint()
    name, _, rest = source.removeprefix(HUB).partition(":")
    column, _, split = rest.partition(":")
    if not name or not column:
        raise UserError(f"{source}: name a dataset on the hub as {HUB}OWNER/NAME:COLUMN or {HUB}OWNER/NAME:COLUMN:SPLIT")
    try:
        rows = load_dataset(name, split=split or "train")
    except Exception as error:  # of many kinds, from many libraries: whatever it is, the user is told and the run ends
        raise UserError(
            f"{source}: cannot be loaded ({type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]})"
        ) from error
    if column not in rows.column_names:
        raise UserError(f"{source}: has no column {column!r}", nearest(column, rows.column_names))
    texts = list(rows[column])
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{source}: the column {column!r} does not hold one string a row")
    return texts


def same_text(text: str) -> str:
    """Normalise case and white space, so that such texts compare equal."""
    return " ".join(text.lower().split())


@cache
def suite_texts() -> tuple[str, ...]:
    """Return the distinct texts of the embedded suite, in a fixed order."""
    found: dict[str, None] = {}
    for path in sorted(SUITE.rglob("*.jsonl")):
        for row in read_jsonl(path):
            for key in ("sentence1", "sentence2", "title", "text", "sentences", "query", "positive", "negative"):
                texts = row.get(key) or ()
                found |= dict.fromkeys([texts] if isinstance(texts, str) else texts)
    return tuple(found)


@cache
def calibration_texts() -> tuple[str, ...]:
    """Return the embedded calibration texts: 512 texts of many kinds, none of which is in the embedded suite."""
    return tuple(row["text"] for row in read_jsonl(CALIBRATION, ("text",)))


def mixed_texts(count: int, seed: int) -> list[str]:
    """Make texts of mixed lengths, 3 to about 250 tokens, from the embedded suite: sentences, and joined documents.

    Word counts are drawn log-uniformly: many short and few long texts, as in requests to an embedder.
    """
    generator = np.random.default_rng(seed)
    pool = suite_texts()
    made = []
    for wanted in np.exp(generator.uniform(np.log(3), np.log(LONGEST_WORDS), size=count)):
        words: list[str] = []
        while len(words) < wanted:
            words += pool[int(generator.integers(len(pool)))].split()
        made.append(" ".join(words[: max(3, int(wanted))]))
    return made


def measure_texts(source: str, count: int, seed: int) -> list[str]:
    """Return `count` texts to measure on: made from the embedded suite (`mini`), or sampled with a seed from a file.

    Raises:
        UserError: the file has fewer texts.
    """
    return mixed_texts(count, seed) if source == "mini" else _drawn(read_texts(source), source, count, seed, "measure.count")


def texts_to_calibrate(source: str, count: int, seed: int) -> list[str]:
    """Return `count` texts to calibrate on, sampled with a seed from the embedded texts (`embedded`) or from a file.

    Raises:
        UserError: the source has fewer texts.
    """
    texts = calibration_texts() if source == "embedded" else read_texts(source)
    return _drawn(texts, source, count, seed, "calibration.count")


def _drawn(texts: Sequence[str], source: str, count: int, seed: int, key: str) -> list[str]:
    if len(texts) < count:
        raise UserError(f"{source}: has {len(texts)} texts, {count} are needed", f"lower {key}")
    chosen = np.random.default_rng(seed).choice(len(texts), size=count, replace=False)
    return [texts[index] for index in chosen]
