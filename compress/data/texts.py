"""Texts from files: JSON lines (gzipped or not) and plain text; errors name file and line. No torch here."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from compress.common.errors import UserError, nearest

SUITE = Path(str(resources.files("compress.data"))) / "suite"
CALIBRATION = SUITE.with_name("calibration.jsonl")
# Longest text of `mixed_texts` in words: about 250 tokens, where a MiniLM truncates.
LONGEST_WORDS = 190
HUB = "hub:"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file, gzipped or not, with their numbers from 1; blank lines are skipped.

    Raises:
        UserError: the file is missing, is not UTF-8, or is not valid gzip.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_jsonl(path: Path, required: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Read JSON lines.

    Raises:
        UserError: a line is not a JSON object or lacks a required key, or there are no rows; names file and line.
    """
    rows = list(iterate_jsonl(path, required))
    if not rows:
        raise UserError(f"{path}: has no rows")
    return rows


def iterate_jsonl(path: Path, required: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file of JSON lines one by one; raises what `read_jsonl` raises for a row."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        missing = [key for key in required if key not in row]
        if missing:
            raise UserError(f"{path}, line {number}: lacks {missing[0]!r}; it has {', '.join(sorted(row))}")
        yield row


def is_hub(source: Path | str) -> bool:
    """Whether a source of texts names a dataset on the hub, not a file."""
    return str(source).startswith(HUB)


def read_texts(source: Path | str) -> list[str]:
    """Read texts: the `text` of each row of a JSONL file (`.jsonl`, `.jsonl.gz`), the lines of another text file, or a hub dataset.

    Args:
        source: a path, or `hub:OWNER/NAME:COLUMN[:SPLIT]`; the split defaults to `train`.

    Raises:
        UserError: the source cannot be read, or does not hold text.
    """
    if is_hub(source):
        return _hub_texts(str(source))
    path = Path(source)
    return list(iterate_texts(path))


def iterate_texts(path: Path) -> Iterator[str]:
    """Yield the texts of a file one by one, as `read_texts` returns them, in the memory of one.

    Raises:
        UserError: the file cannot be read, or does not hold text; names the file and the line.
    """
    if ".jsonl" not in path.suffixes:
        yield from (line for _, line in read_lines(path))
        return
    number = 0
    for number, row in enumerate(iterate_jsonl(path, ("text",)), start=1):
        if not isinstance(row["text"], str):
            raise UserError(f"{path}, row {number}: 'text' is {type(row['text']).__name__}, not a string")
        yield row["text"]
    if not number:
        raise UserError(f"{path}: has no rows")


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
