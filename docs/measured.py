"""Keeps the numbers in README and docs/ equal to the records under results/.

    python docs/measured.py            # writes every generated block anew
    python docs/measured.py --check    # lists what differs or has no source; exit code 1 if anything does

Three conventions, all of them HTML comments that a rendered page does not show:

- `<!-- table: NAME -->` ... `<!-- end -->`: a block that this script writes; `measured_blocks.py` says from which records.
- `1.51 times<!-- faster: int8-minilm -->`: a number and the record that it comes from; `VALUES` of `measured_records.py` lists the
  keys. A run is named by its folder under results/, or by that name without the hash where this is unique.
- `<!-- by: python benchmarks/nv_head.py -->`: the command that measured the table below, or the paragraph that it stands in.

Every number with a unit in a table or a sentence needs one of the three.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from measured_blocks import BLOCKS
from measured_records import ROOT, VALUES, StaleError

BLOCK = re.compile(r"<!-- table: (?P<name>[^>]+?) -->\n(?P<body>.*?)<!-- end -->", re.S)
MARK = re.compile(r"<!-- (?P<key>[a-z][a-z0-9 ]*): (?P<names>[^>]+?) -->")
BY = re.compile(r"<!-- by: (?P<command>[^>]+?) -->")
COMMAND = re.compile(r"^(python |compress |pytest |make |[\w./-]+\.(?:md|py|json)$)")
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = re.compile(rf"(?<![\w.-])(?P<number>{NUMBER}) ?(?P<unit>times\b|x(?![\w])|%|[KMG]B\b|ms\b|s\b|min\b|minutes\b|texts/s)")
HEADED = re.compile(r"\b([KMG]B|ms|texts/s|s per)\b")
NO_MEASUREMENT = re.compile(r"\b95 % interval")
BLANK = re.compile(r"\n\s*\n")


def pages() -> list[Path]:
    """Return the pages whose numbers are kept."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """Return a page with its blocks written anew.

    Raises:
        StaleError: a block has a name that nothing makes.
    """

    def block(found: re.Match[str]) -> str:
        if found["name"] not in BLOCKS:
            raise StaleError(f"table {found['name']!r}: there are {', '.join(BLOCKS)}")
        return f"<!-- table: {found['name']} -->\n\n{BLOCKS[found['name']]()}\n\n<!-- end -->"

    return BLOCK.sub(block, text)


def wrong_mark(before: str, key: str, names: str) -> str | None:
    """Say how a marked number differs from its record; None if it does not.

    Args:
        before: the text that the mark follows.
        key: what of the records, one of `VALUES`.
        names: the records, and what else the key wants, with commas.
    """
    if key not in VALUES:
        return f"{key!r} is no key of a record: there are {', '.join(VALUES)}"
    try:
        value = VALUES[key](*(name.strip() for name in names.split(",")))
    except (StaleError, KeyError, StopIteration, TypeError) as error:
        return f"{key}: {names}: {error}"
    if isinstance(value, str):
        return None if before.endswith(value) else f"...{before[-30:]!r}: {names} has {key} {value}"
    found = re.search(rf"({NUMBER})[^\d]{{0,12}}$", before)
    if found is None:
        return f"...{before[-30:]!r}: no number before {key}: {names}"
    said = found[1].replace(",", "")
    right = f"{value:.{len(said.partition('.')[2])}f}"
    return None if said == right else f"...{before[-30:]!r}: {names} has {key} {right}"


def _paragraphs(text: str) -> Iterator[str]:
    """Give the parts of a page between blank lines, without code and generated blocks."""
    plain = re.sub(r"^```.*?^```", "", BLOCK.sub("", text), flags=re.S | re.M)
    pending = ""
    for part in BLANK.split(plain):
        if part.strip() and not part.startswith("    "):
            # a line with nothing but the command belongs to what follows it
            if BY.fullmatch(part.strip()):
                pending = part + "\n"
                continue
            yield pending + part
            pending = ""


def _unsourced(paragraph: str) -> Iterator[str]:
    """Give the numbers of a paragraph or table that have no source."""
    commands = [found["command"] for found in BY.finditer(paragraph)]
    yield from (f"by: {command!r} is neither a command nor a file" for command in commands if not COMMAND.match(command))
    if commands:
        return
    if paragraph.lstrip().startswith("|"):
        rows = paragraph.strip().splitlines()
        if HEADED.search(rows[0]) or any(UNIT.search(row) for row in rows):
            yield f"table {rows[0]!r} has measured numbers and no `<!-- by: COMMAND -->` before it"
        return
    prose = NO_MEASUREMENT.sub("", re.sub(r"`[^`]*`", "", paragraph))
    for found in UNIT.finditer(prose):
        if not prose[found.end() :].lstrip(" ),").startswith("<!-- "):
            yield f"{found[0]!r} in {' '.join(prose[max(0, found.start() - 40) : found.end() + 20].split())!r} has no source"


def faults(text: str) -> list[str]:
    """Return what is wrong with a page's numbers."""
    found = []
    try:
        for old, new in zip(BLOCK.finditer(text), BLOCK.finditer(written(text)), strict=True):
            if old[0] != new[0]:
                found.append(f"table {old['name']!r} is not what the records say: python docs/measured.py writes it")
    except StaleError as error:
        found.append(str(error))
    rest = BLOCK.sub("", text)
    for mark in MARK.finditer(rest):
        if mark["key"] not in ("by", "table"):
            wrong = wrong_mark(MARK.sub("", rest[: mark.start()]).rstrip(), mark["key"], mark["names"])
            found += [wrong] if wrong else []
    return found + [fault for paragraph in _paragraphs(text) for fault in _unsourced(paragraph)]


def main() -> None:
    """Write the blocks, or check everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; list what is wrong")
    arguments = parser.parse_args()
    wrong = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if not arguments.check and (new := written(text)) != text:
            page.write_text(new, encoding="utf-8")
            print(f"written: {page.relative_to(ROOT)}")
            text = new
        wrong += [f"{page.relative_to(ROOT)}: {fault}" for fault in faults(text)]
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
