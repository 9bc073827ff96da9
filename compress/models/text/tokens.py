"""Texts to token ids, and token ids to batches. No torch and no transformers here: the Rust tokenizer alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from compress.common.errors import UserError
from compress.models.text.spec import EmbedderSpec

Ids = npt.NDArray[np.int64]

# Tokens. Above this a text is not padded, nor are others padded to it.
LONGEST_PADDED = 2_048
# What puts no special token anywhere, as `tokenizer.json` has it.
ALONE: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open a folder's `tokenizer.json`.

    Raises:
        UserError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder}: no tokenizer.json")
    return Tokenizer.from_file(str(path))


class TextTokenizer:
    """The model's own tokenizer, cut to its longest input and never padding (a batch pads itself)."""

    def __init__(self, tokenizer: Tokenizer, max_length: int, spec: EmbedderSpec) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=max_length, direction=spec.truncation_side)
        self._spec = spec
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, special tokens included, at most `max_length` of them."""
        if self._spec.lowercase:
            texts = [text.lower() for text in texts]
        if self._spec.suffix:
            texts = [text + self._spec.suffix for text in texts]
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in self._tokenizer.encode_batch_fast(list(texts))]

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, special ones included, before anything is cut off."""
        return [len(encoding.ids) for encoding in self._uncut.encode_batch_fast(list(texts))]

    @cached_property
    def _uncut(self) -> Tokenizer:
        """A copy that cuts nothing off; one tokenizer may be asked by several threads, so its own setting stays."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def prompt_length(self, prompt: str) -> int:
        """Return how many leading tokens a prompt takes, counted as the model was trained.

        Tokenized alone, less the special token that ends it (sentence-transformers), or without any special token (NV-Embed: the
        prompt's last piece merges with the text's first word, so that this count covers the leading special token instead).
        """
        prompt = prompt.lower() if self._spec.lowercase else prompt
        encoding = self._tokenizer.encode(prompt, add_special_tokens=self._spec.prompt_specials)
        ends_special = bool(encoding.special_tokens_mask) and encoding.special_tokens_mask[-1] == 1
        return len(encoding.ids) - int(ends_special)

    def definition(self) -> dict[str, Any]:
        """Return what `tokenizer.json` would hold."""
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return content

    def ending_itself(self) -> TextTokenizer:
        """Return one that puts the spec's suffix behind every text as a special token, as other libraries' tokenizers do.

        Ids are the same but where a text is cut: this one then cuts the text and not its end. Prompts' tokens count with the
        special ones before them.

        Raises:
            ValueError: the suffix is no special token, or `tokenizer.json` puts special tokens elsewhere than in a template.
        """
        definition, suffix = self.definition(), self._spec.suffix
        spec = self._spec.model_copy(update={"suffix": "", "prompt_specials": True})
        if suffix:
            template = definition["post_processor"] or deepcopy(ALONE)
            number = next((token["id"] for token in definition["added_tokens"] if token["content"] == suffix), None)
            if number is None or template["type"] != "TemplateProcessing":
                raise ValueError(f"its tokenizer cannot put {suffix!r} behind texts by itself")
            template["single"].append({"SpecialToken": {"id": suffix, "type_id": 0}})
            template["special_tokens"][suffix] = {"id": suffix, "ids": [number], "tokens": [suffix]}
            definition["post_processor"] = template
        return TextTokenizer(Tokenizer.from_str(json.dumps(definition)), self.max_length, spec)

    @property
    def spec(self) -> EmbedderSpec:
        """How it takes texts."""
        return self._spec

    def redefined(self, definition: dict[str, Any]) -> TextTokenizer:
        """Return a tokenizer of another definition that takes texts as this one does."""
        return TextTokenizer(Tokenizer.from_str(json.dumps(definition)), self.max_length, self._spec)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[npt.NDArray[np.intp]]:
    """Yield index arrays that cover `lengths` once, longest first, each of at most `batch_tokens` tokens after padding.

    Sorting puts equal lengths side by side, so little is padded; longest first, because what does not fit in memory should fail at
    once. A text longer than the budget gets a batch of its own. Texts above `LONGEST_PADDED` are batched with equally long ones
    alone: padding wants a mask, and a mask grows with the square of the length.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        stop = start + max(1, batch_tokens // longest)
        if longest > LONGEST_PADDED:
            stop = min(stop, start + sum(lengths[index] == longest for index in order[start:stop]))
        yield order[start:stop]
        start = stop


def pad_batch(rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Return right-padded ids and their mask, both int64 [len(rows), longest]. The pad id is 0: masked, so any id would do."""
    ids = np.zeros((len(rows), max(1, max(map(len, rows)))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


Batch = tuple[Ids, Ids]
"""Padded ids and their mask, both int64 [texts, length]."""
