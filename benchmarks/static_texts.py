"""Make the texts that a static table learns from: the kinds of text in a corpus in even shares, and words that the corpus lacks.

python benchmarks/static_texts.py texts.jsonl.gz -o static.jsonl.gz

Rows want `text`, `source` and `kind`. Passages are cut into sentences, because a table learns more from many short texts than from
few long ones; in a part of the sentences words are replaced by others of the teacher's vocabulary, as in `nano_texts.py`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from nano_texts import Words

from compress.data.texts import read_jsonl
from compress.models.source import find

MOST = {
    "SNLI dev+test": None,
    "query-wellformedness": None,
    "clinc150": None,
    "sgd": 35_000,
    "restaurant8k": 5_000,
    "QMSum test split": 2_500,
    "wiki-split": 30_000,
    "enwiki evidence": None,
}
"""Texts of each source; None: all."""
PASSAGES, DOCUMENTATION = "IBM Debater Wikipedia articles", "library documentation"
SENTENCES, DOCUMENTATION_TEXTS, WHOLE_PASSAGES = 70_000, 3_000, 12_000
SWAPPED_SENTENCES, SWAPPED = 35_000, {"wiki-split": 8_000, "SNLI dev+test": 8_000}
WORD_TEXTS, WORDS = 20_000, (2, 6)
"""Texts that are a few words drawn at random, and how many words."""
SHORTEST_SENTENCE = 21
"""In characters."""


def sentences(passages: Sequence[str]) -> list[str]:
    """Cut passages into sentences."""
    parts = (part.strip() for passage in passages for part in re.split(r"(?<=[.!?])\s+", passage))
    return [part for part in parts if len(part) >= SHORTEST_SENTENCE]


def drawn(by_source: Mapping[str, Sequence[str]], words: Words, chance: random.Random) -> list[str]:
    """Draw the texts of every kind, each text once, in a random order."""

    def some(source: str, count: int | None) -> list[str]:
        texts = by_source[source]
        return chance.sample(texts, min(count or len(texts), len(texts)))

    cut = sentences(by_source[PASSAGES])
    chance.shuffle(cut)
    made = [text for source, count in MOST.items() for text in some(source, count)]
    made += cut[:SENTENCES] + some(DOCUMENTATION, DOCUMENTATION_TEXTS)
    made += [words.swapped(text) for text in cut[SENTENCES : SENTENCES + SWAPPED_SENTENCES]]
    made += [words.swapped(text) for text in [text for source, count in SWAPPED.items() for text in some(source, count)]]
    made += some(PASSAGES, WHOLE_PASSAGES)
    made += [" ".join(words.draw() for _ in range(chance.randint(*WORDS))) for _ in range(WORD_TEXTS)]
    made = list(dict.fromkeys(text for text in made if text.strip()))
    chance.shuffle(made)
    return made


def main() -> None:
    """Write the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--count", type=int, help="texts to write; all by default")
    parser.add_argument("-o", "--to", type=Path, required=True)
    arguments = parser.parse_args()
    chance, by_source = random.Random(0), defaultdict[str, list[str]](list)
    for row in read_jsonl(arguments.texts, ("text", "source", "kind")):
        by_source[row["source"]].append(row["text"])
    words = Words(find(arguments.teacher).path / "tokenizer.json", chance)
    texts = drawn(by_source, words, chance)[: arguments.count]
    with gzip.open(arguments.to, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    print(f"{len(texts):,} texts, {sum(map(len, texts)) / 1e6:.1f} M characters")


if __name__ == "__main__":
    main()
