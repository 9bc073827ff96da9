"""Trims a tokenizer's vocabulary. A text that needs only kept tokens is split into the same tokens, renumbered. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from compress.common.errors import UserError

# How tokenizers name the tokens for single bytes, which they fall back to for unknown characters.
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def kept_tokens(tokenizer: dict[str, Any], seen: Iterable[int]) -> list[int]:
    """Return the tokens that a trimmed tokenizer must keep.

    These are the tokens that were seen; special and added tokens; single characters and bytes, so that every text that could be
    tokenized still can; and for BPE the two parts of each kept token, which its merges need.

    Args:
        tokenizer: the content of `tokenizer.json`.
        seen: ids of the tokens that were seen.

    Returns:
        The ids of the kept tokens, in ascending order.

    Raises:
        UserError: the tokenizer is not a WordPiece, BPE or Unigram tokenizer.
    """
    model = tokenizer["model"]
    vocabulary = _vocabulary(model)
    names = {number: token for token, number in vocabulary.items()}
    added = [entry["id"] for entry in tokenizer.get("added_tokens", [])]
    kept = {number for number in seen if number in names}
    kept |= {number for token, number in vocabulary.items() if _is_basic(token, model)}
    kept |= {vocabulary[token] for token in _special(tokenizer) if token in vocabulary}
    if model["type"] == "BPE":
        made_of: dict[str, tuple[str, str]] = {}
        for left, right in _merges(model):
            made_of.setdefault(left + right, (left, right))
        # A kept token can only be built if both parts of its merge are kept, and so on down to single characters.
        waiting = [names[number] for number in kept]
        while waiting:
            for half in made_of.get(waiting.pop(), ()):
                if vocabulary[half] not in kept:
                    kept.add(vocabulary[half])
                    waiting.append(half)
    return sorted(kept | set(added))


def with_tokens(tokenizer: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Return the content of a `tokenizer.json` with only the kept tokens, renumbered from 0 in the given order.

    Args:
        tokenizer: the content of the model's `tokenizer.json`.
        kept: ids of the tokens to keep, from `kept_tokens`.

    Raises:
        UserError: the tokenizer is not a WordPiece, BPE or Unigram tokenizer.
    """
    number_of = {old: new for new, old in enumerate(kept)}
    model = dict(tokenizer["model"])
    vocabulary = _vocabulary(model)
    left = {token: number_of[number] for token, number in vocabulary.items() if number in number_of}
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][number] for number in kept if number < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = number_of[model["unk_id"]]
    else:
        model["vocab"] = left
    if model["type"] == "BPE":
        pairs = zip(model["merges"], _merges(model), strict=True)
        model["merges"] = [written for written, (a, b) in pairs if {a, b, a + b} <= left.keys()]
    added = [{**entry, "id": number_of[entry["id"]]} for entry in tokenizer.get("added_tokens", [])]
    post = _renumbered(tokenizer.get("post_processor"), number_of)
    return {**tokenizer, "model": model, "added_tokens": added, "post_processor": post, "padding": None}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] in ("WordPiece", "BPE"):
        found: dict[str, int] = model["vocab"]
        return found
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    raise UserError(f"a tokenizer of type {model['type']!r} cannot be trimmed", "WordPiece, BPE and Unigram can")


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _is_basic(token: str, model: dict[str, Any]) -> bool:
    """Whether a token is a byte or a single character, at the start of a word or inside one."""
    return len(token.removeprefix(model.get("continuing_subword_prefix") or "")) == 1 or _BYTE.fullmatch(token) is not None


def _special(tokenizer: dict[str, Any]) -> list[str]:
    """Return the tokens that the tokenizer adds by itself: added tokens and the unknown token."""
    found = [entry["content"] for entry in tokenizer.get("added_tokens", [])]
    unknown = tokenizer["model"].get("unk_token")
    if unknown is not None:
        found.append(unknown)
    elif tokenizer["model"].get("unk_id") is not None:
        found.append(tokenizer["model"]["vocab"][tokenizer["model"]["unk_id"]][0])
    return found


def _renumbered(post: Any, number_of: dict[int, int]) -> Any:
    """Return a post-processor that adds the same special tokens with their new ids."""
    if post is None:
        return None
    made = dict(post)
    if post["type"] == "Sequence":
        made["processors"] = [_renumbered(one, number_of) for one in post["processors"]]
    elif post["type"] == "TemplateProcessing":
        made["special_tokens"] = {
            name: {**entry, "ids": [number_of[number] for number in entry["ids"]]} for name, entry in post["special_tokens"].items()
        }
    for key in ("sep", "cls"):  # BertProcessing, RobertaProcessing
        if key in post:
            made[key] = [post[key][0], number_of[post[key][1]]]
    return made
