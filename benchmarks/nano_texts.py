"""Make the texts of nano's second training stage from those of the first: longer texts, and words that the first lacks.

python benchmarks/nano_texts.py texts.jsonl.gz -o second.jsonl.gz

Rows want `text`, `source` and `kind` (passage, sentence, or something short). A text with other words in it need not mean anything:
what is asked of a student is the vector that the teacher gives it, and a teacher knows more words than a corpus of talk holds.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from compress.data.texts import read_jsonl
from compress.models.source import find

SHORT, SWAPPED = 120_000, 100_000
JOINED = range(2, 5)
SWAPPED_SHARE = (0.15, 0.6)
WORD = re.compile(r"[A-Za-z]{4,}")


def joined(rows: Sequence[dict[str, str]], chance: random.Random) -> list[str]:
    """Join two to four neighbouring passages of one source into a text."""
    texts, at = [], 0
    while at < len(rows):
        part = rows[at : at + chance.choice(JOINED)]
        at += len(part)
        if len(part) > 1 and len({row["source"] for row in part}) == 1:
            texts.append(" ".join(row["text"] for row in part))
    return texts


class Words:
    """Yield words of a teacher's vocabulary, whole or joined from its pieces, and names in the style of science and trade."""

    def __init__(self, tokenizer: Path, chance: random.Random) -> None:
        pieces = sorted(Tokenizer.from_file(str(tokenizer)).get_vocab())
        self._whole = [piece for piece in pieces if piece.isascii() and WORD.fullmatch(piece)]
        self._ends = [piece[2:] for piece in pieces if piece.isascii() and re.fullmatch(r"##[a-z]{2,}", piece)]
        self._chance = chance

    def draw(self) -> str:
        """Draw one: seven in ten are whole."""
        kind, word = self._chance.random(), self._chance.choice(self._whole)
        if kind < 0.7:
            return word
        if kind < 0.85:
            return word + self._chance.choice(self._ends)
        letters = "".join(self._chance.choices("ABCDEFGHIKLMNPRSTX", k=self._chance.randint(1, 4)))
        return f"{letters}{self._chance.choice(['', '-'])}{self._chance.randint(1, 120)}"

    def swapped(self, text: str) -> str:
        """Put others in the place of a share of a text's longer words, one word's other always the same."""
        words = sorted(set(WORD.findall(text)))
        share = self._chance.uniform(*SWAPPED_SHARE)
        other = {word: self.draw() for word in words if self._chance.random() < share}
        return WORD.sub(lambda found: other.get(found[0], found[0]), text)


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("-o", "--to", type=Path, required=True)
    arguments = parser.parse_args()
    chance = random.Random(0)
    rows = read_jsonl(arguments.texts, ("text", "source", "kind"))
    passages = [row for row in rows if row["kind"] == "passage"]
    sentences = [row["text"] for row in rows if row["kind"] == "sentence"]
    short = [row["text"] for row in rows if row["kind"] not in ("passage", "sentence")]
    long = joined(passages, chance)
    whole = [*sentences, *(row["text"] for row in passages), *long]
    words = Words(find(arguments.teacher).path / "tokenizer.json", chance)
    swapped = [words.swapped(text) for text in chance.sample(whole, min(SWAPPED, len(whole)))]
    made = list(dict.fromkeys([*whole, *chance.sample(short, min(SHORT, len(short))), *swapped]))
    chance.shuffle(made)
    with gzip.open(arguments.to, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in made)
    print(f"{len(made):,} texts, of them {len(long):,} joined, {len(swapped):,} with other words")


if __name__ == "__main__":
    main()
