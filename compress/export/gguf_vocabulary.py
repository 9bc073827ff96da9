"""Conversion of a `tokenizer.json` to GGUF, for tokenizers that llama.cpp reproduces: uncased BERT and Llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError
from compress.common.inputs import read_json

if TYPE_CHECKING:
    from gguf import GGUFWriter

SPACE = "\u2581"
# Score of tokens that no merge makes: lower than that of any merge.
UNMERGED = -1e6
PREPENDED = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}


@dataclass(frozen=True)
class GGUFVocabulary:
    """A tokenizer in the terms of llama.cpp."""

    model: str
    """Value of `tokenizer.ggml.model`: `bert` or `llama`."""
    tokens: list[str]
    types: list[str]
    """Type of each token, a name of `gguf.TokenType`."""
    scores: list[float] | None
    """Score of each token of a Llama tokenizer: the merge with the higher score comes first. None for BERT."""
    special: Mapping[str, int]
    """Ids of special tokens, by `bos`, `eos`, `unk`, `sep`, `pad`, `mask`."""
    starts: int
    """Number of special tokens before a text."""
    ends: int
    """Number of special tokens after a text."""

    def write(self, writer: GGUFWriter) -> None:
        """Write the tokenizer into the header of a file."""
        from gguf import TokenType

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre("default")
        writer.add_token_list(self.tokens)
        writer.add_token_types([TokenType[name] for name in self.types])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_bos_token(bool(self.starts))
            writer.add_add_eos_token(bool(self.ends))
        else:
            writer.add_token_type_count(2)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)


def read_vocabulary(path: Path, size: int) -> GGUFVocabulary:
    """Read a `tokenizer.json`.

    Args:
        path: the file.
        size: rows of the token table; unused rows get placeholder tokens.

    Raises:
        UserError: llama.cpp has no equivalent tokenizer.
    """
    found = read_json(path)
    kind = found["model"]["type"]
    if kind == "WordPiece":
        return _wordpiece(found, size)
    if kind == "BPE" and found["model"].get("byte_fallback"):
        return _merges(found, size)
    raise _refusal(f"is {kind}")


def _wordpiece(found: Mapping[str, Any], size: int) -> GGUFVocabulary:
    """Convert an uncased BERT tokenizer: llama.cpp lowercases all texts and strips accents."""
    normalizer, model = found["normalizer"] or {}, found["model"]
    uncased = normalizer.get("type") == "BertNormalizer" and normalizer["lowercase"] and normalizer["strip_accents"] is not False
    if (
        not uncased
        or (found["pre_tokenizer"] or {}).get("type") != "BertPreTokenizer"
        or model["continuing_subword_prefix"] != "##"
    ):
        raise _refusal("is WordPiece, but not that of an uncased BERT")
    before, after = _around(found)
    if len(before) != 1 or len(after) != 1:
        raise _refusal("does not put one special token before and one after texts")
    tokens, types = _tokens(found, size)
    for index, token in enumerate(tokens):
        if types[index] == "NORMAL":  # llama.cpp marks tokens that begin a word, not those that continue one
            tokens[index] = token[2:] if token.startswith("##") else SPACE + token
    ids = {"bos": before[0], "sep": after[0], "unk": model["vocab"][model["unk_token"]]}
    for name, token in (("pad", "[PAD]"), ("mask", "[MASK]")):
        if token in model["vocab"]:
            ids[name] = model["vocab"][token]
    return GGUFVocabulary("bert", tokens, types, None, ids, 1, 1)


def _merges(found: Mapping[str, Any], size: int) -> GGUFVocabulary:
    """Convert a Llama tokenizer: merges in the order of their tokens' scores, bytes for unknown characters."""
    pre, normalizer = found["pre_tokenizer"], found["normalizer"]
    space = {"type": "Metaspace", "replacement": SPACE, "split": False}
    as_pre = pre is not None and normalizer is None and space.items() <= pre.items() and pre.get("prepend_scheme") != "never"
    if not as_pre and (pre is not None or normalizer != PREPENDED):
        raise _refusal("normalises or splits texts differently from Llama's")
    before, after = _around(found)
    if len(before) > 1 or len(after) > 1:
        raise _refusal("puts several special tokens before or after texts")
    tokens, types = _tokens(found, size)
    if types.count("BYTE") < 256:
        raise _refusal("lacks tokens for single bytes")
    scores = [UNMERGED] * size
    vocabulary = found["model"]["vocab"]
    for rank, merge in enumerate(found["model"]["merges"]):
        made = vocabulary["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        scores[made] = max(scores[made], -float(rank))
    ids = {name: numbers[0] for name, numbers in (("bos", before), ("eos", after)) if numbers}
    if found["model"].get("unk_token") in vocabulary:
        ids["unk"] = vocabulary[found["model"]["unk_token"]]
    return GGUFVocabulary("llama", tokens, types, scores, ids, len(before), len(after))


def _tokens(found: Mapping[str, Any], size: int) -> tuple[list[str], list[str]]:
    """Return the tokens and their types, by id."""
    tokens, types = [f"[PAD{index}]" for index in range(size)], ["UNUSED"] * size
    for token, index in found["model"]["vocab"].items():
        byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[index], types[index] = token, "BYTE" if byte else "NORMAL"
    for token in found["added_tokens"]:
        if types[token["id"]] != "BYTE":
            tokens[token["id"]] = token["content"]
            types[token["id"]] = "CONTROL" if token["special"] else "USER_DEFINED"
    unknown = found["model"]["vocab"].get(found["model"].get("unk_token"))
    if unknown is not None and found["model"]["type"] == "BPE":
        types[unknown] = "UNKNOWN"
    return tokens, types


def _around(found: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the ids of the special tokens that a tokenizer puts before and after a text."""
    template = found["post_processor"]
    if template is None:
        return [], []
    if template["type"] == "BertProcessing":
        return [template["cls"][1]], [template["sep"][1]]
    if template["type"] != "TemplateProcessing":
        raise _refusal(f"ends with a {template['type']}")
    sides: tuple[list[int], list[int]] = [], []
    after_text = False
    for piece in template["single"]:
        if "Sequence" in piece:
            after_text = True
        else:
            sides[after_text].extend(template["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return sides


def _refusal(why: str) -> UserError:
    return UserError(
        f"cannot be written as gguf: the tokenizer {why}, and llama.cpp has no equivalent",
        "export as onnx or openvino, which include the tokenizer unchanged",
    )
