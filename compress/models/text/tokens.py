"""From texts to token ids, and from token ids to batches. No torch or transformers here, only the Rust tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from compress.common.errors import UserError
from compress.common.inputs import check_file, read_as, read_text
from compress.models.text.spec import EmbedderSpec

Ids = npt.NDArray[np.int64]

TOKENIZER_BYTES = 256 * 2**20
"""Largest `tokenizer.json`; one of 500,000 tokens and their merges has 40 MB."""
# In tokens. Longer texts are batched only with texts of equal length, so no padding is needed.
LONGEST_PADDED = 2_048
# Texts of up to so many characters, or so many for each token that is kept, are tokenized as they are.
SHORTEST_CUT, CUT_CHARACTERS = 32_768, 32
# So many tokens more than are kept must come out of a part of a text.
SPARE_TOKENS = 256
_SPACE = re.compile(r"\s")
# A post-processor of `tokenizer.json` that adds no special tokens.
NO_SPECIAL_TOKENS: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


def open_tokenizer(folder: Path) -> Tokenizer:
    """Open a folder's `tokenizer.json`.

    Raises:
        UserError: there is no such file, or it is not a tokenizer.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder}: no tokenizer.json")
    content = read_text(path, TOKENIZER_BYTES)
    try:
        return Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer ({str(error).strip() or type(error).__name__})") from error


class _TokenizerConfig(BaseModel):
    """Keys of `tokenizer_config.json` whose types are checked; transformers judges all others."""

    model_config = ConfigDict(extra="allow", strict=True)

    model_max_length: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    tokenizer_class: str | None = None
    added_tokens_decoder: dict[str, dict[str, Any]] | None = None


TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken", "tekken.json", "bpe.codes")
"""Files that hold a tokenizer's tokens; without any, transformers makes an empty one and every text becomes unknown tokens."""


def check_tokenizer(folder: Path) -> None:
    """See that a folder holds a tokenizer, before transformers makes one from what is there.

    Raises:
        UserError: it holds none, or a file of it is no regular one or of wrong types.
    """
    if not any(path for kind in TOKENIZER_FILES for path in folder.glob(kind)):
        raise UserError(f"{folder}: no tokenizer files", f"one of {', '.join(TOKENIZER_FILES)}")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        read_as(settings, _TokenizerConfig)
    for name in ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        if (folder / name).exists():
            check_file(folder / name)


def unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the id of the token that stands for what a tokenizer has no token for; None if it has no such token."""
    model = tokenizer.model
    if hasattr(model, "unk_token"):  # WordPiece, BPE and WordLevel
        return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
    found: int | None = json.loads(tokenizer.to_str())["model"].get("unk_id")
    return found


class TextTokenizer:
    """The model's own tokenizer. It truncates to the model's maximum length and does not pad; `pad_batch` does."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_length: int,
        spec: EmbedderSpec,
        positions: int | None = None,
        rows: int | None = None,
    ) -> None:
        """Set a tokenizer up for a model.

        Args:
            tokenizer: the model's; it is changed.
            max_length: longest input in tokens, special tokens counted; longer texts are cut.
            spec: how the model takes texts.
            positions: how many tokens the network has positions for; None: any number.
            rows: how many tokens the network's table has vectors for; None: those of the tokenizer.
        """
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_length=max_length, direction=spec.truncation_side)
        self._spec = spec
        self.max_length = max_length
        self.positions = positions
        self._rows = rows
        self._whole = max(SHORTEST_CUT, CUT_CHARACTERS * max_length)

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, including special tokens: int64 [length], at most `max_length` of them."""
        if self._spec.lowercase:
            texts = [text.lower() for text in texts]
        if self._spec.suffix:
            texts = [text + self._spec.suffix for text in texts]
        if self._spec.max_characters is not None:
            texts = [text[: self._spec.max_characters] for text in texts]
        texts = [text if len(text) <= self._whole else self._cut(text) for text in texts]
        made = [np.asarray(encoding.ids, dtype=np.int64) for encoding in self._tokenizer.encode_batch_fast(texts)]
        self._check_ids(made)
        return made if self._skipped is None else [row[row != self._skipped] for row in made]

    @cached_property
    def _skipped(self) -> int | None:
        """The id of the token that is left out of every text; None: none is."""
        return unknown_token(self._tokenizer) if self._spec.skip_unknown else None

    def _check_ids(self, made: Sequence[Ids]) -> None:
        """See that the network's table has a row for each token.

        Raises:
            UserError: it has not, so the tokenizer is another model's.
        """
        if self._rows is None:
            return
        largest = max((int(ids.max()) for ids in made if len(ids)), default=0)
        if largest >= self._rows:
            raise UserError(
                f"the tokenizer gives token {largest}, {self._tokenizer.id_to_token(largest)!r}, and the network's table has "
                f"{self._rows} rows",
                "the tokenizer and the weights are of different models",
            )

    def _cut(self, text: str) -> str:
        """Return the part of a very long text that its first tokens (the last, for models that cut in front) come from.

        Tokenizing the whole text would take some hundred bytes a character, only to throw nearly all tokens away. The part has so
        many more tokens than are kept that where it ends does not change these.
        """
        size, before = self._whole, -1
        from_end = self._spec.truncation_side == "left"
        while size < len(text):
            part = text[-size:] if from_end else text[:size]
            count = len(self._untruncated.encode_batch_fast([part])[0].ids)
            if count >= self.max_length + SPARE_TOKENS:
                return part
            # A giant word, which has few tokens however long it is, or one whose end cannot be seen: the rest adds nothing to it.
            rest = text[:-size] if from_end else text[size:]
            if count == before and _SPACE.search(rest) is None:
                return part
            size, before = 4 * size, count
        return text

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, including special tokens, before truncation."""
        return [len(encoding.ids) for encoding in self._untruncated.encode_batch_fast(list(texts))]

    @cached_property
    def _untruncated(self) -> Tokenizer:
        """A copy that does not truncate. Several threads may use this tokenizer at once, so its own setting must not change."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def prompt_length(self, prompt: str) -> int:
        """Return the number of leading tokens of a text that count as its prompt, as the model was trained.

        sentence-transformers tokenizes the prompt by itself and leaves out the special token at its end. NV-Embed tokenizes it
        without any special token. There the prompt's last token merges with the text's first word, so the count still covers the
        special token at the start.
        """
        prompt = prompt.lower() if self._spec.lowercase else prompt
        encoding = self._tokenizer.encode(prompt, add_special_tokens=self._spec.prompt_specials)
        ends_special = bool(encoding.special_tokens_mask) and encoding.special_tokens_mask[-1] == 1
        return len(encoding.ids) - int(ends_special)

    def definition(self) -> dict[str, Any]:
        """Return the content of `tokenizer.json` for this tokenizer."""
        content: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return content

    def ending_itself(self) -> TextTokenizer:
        """Return a tokenizer that adds the spec's suffix after every text as a special token, as tokenizers elsewhere do.

        Its ids are the same, except for texts that are truncated: it then keeps the suffix and removes the end of the text. The
        special tokens before a prompt count as part of the prompt.

        Raises:
            ValueError: the suffix is not a special token, or `tokenizer.json` does not add special tokens by a template.
        """
        definition, suffix = self.definition(), self._spec.suffix
        spec = self._spec.model_copy(update={"suffix": "", "prompt_specials": True})
        if suffix:
            template = definition["post_processor"] or deepcopy(NO_SPECIAL_TOKENS)
            number = next((token["id"] for token in definition["added_tokens"] if token["content"] == suffix), None)
            if number is None or template["type"] != "TemplateProcessing":
                raise ValueError(f"its tokenizer cannot add {suffix!r} after texts by itself")
            template["single"].append({"SpecialToken": {"id": suffix, "type_id": 0}})
            template["special_tokens"][suffix] = {"id": suffix, "ids": [number], "tokens": [suffix]}
            definition["post_processor"] = template
        return TextTokenizer(Tokenizer.from_str(json.dumps(definition)), self.max_length, spec, self.positions)

    @property
    def spec(self) -> EmbedderSpec:
        """How the model takes texts."""
        return self._spec

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens that it knows, added ones counted."""
        return int(self._tokenizer.get_vocab_size())

    def redefined(self, definition: dict[str, Any]) -> TextTokenizer:
        """Return a tokenizer with another definition and the same spec and maximum length.

        Args:
            definition: the content of its `tokenizer.json`.
        """
        return TextTokenizer(Tokenizer.from_str(json.dumps(definition)), self.max_length, self._spec, self.positions)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(path))


def batches_by_tokens(lengths: Sequence[int], batch_tokens: int) -> Iterator[npt.NDArray[np.intp]]:
    """Yield batches as arrays of indices into `lengths`, each of at most `batch_tokens` tokens after padding.

    Every index is yielded once. Texts are sorted by length, so batches need little padding, and the longest come first, so that a
    batch that does not fit in memory fails at once. A text longer than the budget is a batch of its own. Texts longer than
    `LONGEST_PADDED` are batched only with texts of equal length: padding needs a mask, which grows with the square of the length.
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
    """Return right-padded ids and their mask (1 for tokens), both int64 [len(rows), longest].

    The pad id is 0 for every model: padding is masked, so its id has no effect.
    """
    ids = np.zeros((len(rows), max(1, max(map(len, rows)))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


Batch = tuple[Ids, Ids]
"""A padded batch: ids and mask (1 for tokens), both int64 [texts, length]."""
