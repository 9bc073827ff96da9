"""Vocabulary pruning: token embeddings that the texts at hand never use are dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr

from compress.data.texts import read_texts
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method
from compress.models.architectures import is_in_block
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape, with_backbone
from compress.models.text.static import MAPPING, TOKEN_WEIGHTS

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel


class Vocabulary(Method):
    """Keep the tokens that the given texts use, their rows of the embedding table, and a tokenizer with only these.

    Texts that use no other token keep exactly the same vectors. **The risk**: other words are split into smaller pieces, down to
    characters, and embedded worse, above all in other languages. Scores on texts like yours will not show this. Give it many texts
    of every kind that will be embedded.
    """

    family: ClassVar[str] = "smaller"
    method: Literal["vocabulary"] = "vocabulary"
    whole: ClassVar[bool] = True
    without_blocks: ClassVar[bool] = True
    texts: str
    """Texts whose tokens are kept: a JSONL file with `text` (`.gz` allowed) or a plain text file with one text per line."""
    min_count: int = Field(1, ge=1)
    """Number of times a token has to occur in the texts to be kept."""
    tokens: int | None = None
    """Number of tokens that are kept; filled in by the run."""
    _kept: list[int] = PrivateAttr(default_factory=list)

    @property
    def reads(self) -> tuple[str, ...]:
        """The texts."""
        return (self.texts,)

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Choose the tokens and make the tokenizer.

        Raises:
            ValueError: with the chosen tokens a text would be split in another way.
        """
        from compress.models.text.vocabulary import with_tokens

        definition = model.tokenizer.definition()
        kept: list[int] = bench.once(lambda: {"kept": self.choose(model)})["kept"]
        decided = self.model_copy(update={"tokens": len(kept)})
        decided._kept = kept
        changes: dict[str, Any] = {"vocab_size": len(kept)}
        backbone = model.config.get("text_config") or model.config
        for key, value in backbone.items():
            if key.endswith("_token_id") and isinstance(value, int):
                changes[key] = kept.index(value) if value in kept else None
        tokenizer = model.tokenizer.redefined(with_tokens(definition, kept))
        return decided, replace(model, tokenizer=tokenizer, config=with_backbone(model.config, **changes))

    def choose(self, model: OpenModel) -> list[int]:
        """Return the ids of the tokens to keep, ascending.

        Raises:
            ValueError: with only these a text would be split in another way.
        """
        from compress.models.text.vocabulary import kept_tokens, with_tokens

        texts, prompts = read_texts(Path(self.texts)), [*model.spec.prompts.values(), model.spec.default_prompt]
        rows = model.tokenizer(texts)
        counts = Counter(int(token) for row in rows for token in row)
        seen = {token for token, count in counts.items() if count >= self.min_count}
        seen |= {int(token) for row in model.tokenizer(prompts) for token in row}
        definition = model.tokenizer.definition()
        kept = kept_tokens(definition, seen)
        if self.min_count == 1:
            again = model.tokenizer.redefined(with_tokens(definition, kept))(texts)
            for text, row, new in zip(texts, rows, again, strict=True):
                if [kept[number] for number in new] != row.tolist():
                    raise ValueError(f"{text[:60]!r} would be split in another way; this tokenizer cannot be trimmed")
        return kept

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size; before a run has read the texts, the size with all tokens.

        Raises:
            ValueError: the model has no token table.
        """
        table = shape.token_table
        if table is None:
            raise ValueError(f"{shape.name} has no token embedding table")
        rows, width = shape.tensors[f"{table}.weight"].shape
        tensors = dict(shape.as_stored().tensors)
        own = {name: tensors[name] for name in (MAPPING, TOKEN_WEIGHTS) if name in tensors}  # of a static table
        shared = MAPPING in own  # then tokens share rows, and all rows stay
        rows = own[MAPPING].shape[0] if shared else rows
        left = rows if self.tokens is None else self.tokens
        tensors |= {name: replace(info, shape=(left,)) for name, info in own.items()}
        if not shared:
            tensors[f"{table}.weight"] = TensorInfo("F16", (left, width))
        said = (
            f"{left:,} of {rows:,} tokens kept" if self.tokens is not None else f"of {rows:,} tokens those in {self.texts} are kept"
        )
        fewer = (rows - left) * width
        return Estimate(
            after=replace(shape, tensors=tensors, config=with_backbone(shape.config, vocab_size=left)),
            memory_bytes=0,
            bytes_touched=0,
            note=said + (f", {fewer / 1e6:,.1f} M fewer parameters" if self.tokens is not None and not shared else ""),
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Keep the rows of the kept tokens, if the segment has the table."""
        import torch
        from torch import nn

        from compress.models.network.segments import module_in, token_table
        from compress.models.network.static import TokenVectors

        name = token_table(parts)
        if name is None or is_in_block(name):
            return {}
        table = module_in(parts, name)
        assert isinstance(table, nn.Embedding)
        kept = torch.tensor(self._kept, device=table.weight.device)
        for owner in parts.values():
            if isinstance(owner, TokenVectors):
                owner.keep(kept)
                if owner.token_mapping is not None:
                    return {}
        table.weight = nn.Parameter(table.weight.data[kept], requires_grad=False)
        table.num_embeddings = len(kept)
        return {}
