"""A model encoded with something changed: its prompt, its pooling, where it cuts, what its tokens see."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from compress.common.errors import UserError
from compress.measure.doctor.answers import Answers, Facts, Side
from compress.models.embedder import BatchedEmbedder, Vectors
from compress.models.folder import ModelFolder
from compress.models.network.pooling import POOLINGS, TokenPooling, backbone_of, head_of
from compress.models.text.spec import EmbedderSpec, Pooling
from compress.models.text.tokens import TextTokenizer
from compress.runtimes.torch_embedder import TorchEmbedder

# What goes wrong where an architecture does not take a mask of its own: said in the report, and the hypothesis dropped.
MASK_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)


@dataclass(frozen=True)
class Cut:
    """How texts that are too long are cut."""

    side: str
    """left or right."""
    length: int
    """Tokens that are kept."""


@dataclass(frozen=True)
class Change:
    """What is done otherwise than the model's files say; None: as they say."""

    prompt: str | None = None
    prefix: str | None = None
    """Put before texts as a part of them, so that it is pooled whatever is done with prompts."""
    pooling: Pooling | None = None
    causal: bool | None = None
    pool_prompt: bool | None = None
    specials: bool | None = None
    lowercase: bool | None = None
    cut: Cut | None = None

    def and_also(self, other: Change) -> Change:
        """Return both changes in one."""
        own = {field.name: getattr(other, field.name) for field in fields(other)}
        return replace(self, **{name: value for name, value in own.items() if value is not None})


class LocalSide(Side):
    """A model that runs here, and that can be encoded with something changed."""

    def __init__(self, embedder: BatchedEmbedder, folder: ModelFolder | None, kind: str) -> None:
        """Take an embedder and its folder; None where it is an export, whose pooling and attention are in its graph."""
        super().__init__(embedder.name, embedder.spec.prompts)
        self.embedder = embedder
        self.folder = folder
        self._kind = kind

    @property
    def network(self) -> nn.Module | None:
        """The network, where it is in memory as torch's modules."""
        return self.embedder.model if isinstance(self.embedder, TorchEmbedder) else None

    @property
    def pooling(self) -> Pooling | None:
        """The pooling, where it is one mode without weights and can be another."""
        if self.network is None or not isinstance(head_of(self.network).pooling, TokenPooling):
            return None
        modes = self.embedder.spec.poolings
        return modes[0] if len(modes) == 1 else None

    @property
    def cut(self) -> Cut:
        """How it cuts texts."""
        settings = self.embedder.tokenizer.definition().get("truncation") or {}
        return Cut(str(settings.get("direction", "Right")).lower(), self.embedder.tokenizer.max_length)

    def answer(self, texts: Sequence[str], prompt: str | None) -> Answers:
        """Encode texts; see `Side.answer`.

        Raises:
            UserError: no vector is finite.
        """
        try:
            return Answers(self.embedder.encode(texts, prompt, progress=False))
        except FloatingPointError:
            return self._one_by_one(texts, prompt)

    def _one_by_one(self, texts: Sequence[str], prompt: str | None) -> Answers:
        rows: list[Vectors | None] = []
        refused: dict[int, str] = {}
        for index, text in enumerate(texts):
            try:
                rows.append(self.embedder.encode([text], prompt, progress=False)[0])
            except FloatingPointError:
                rows.append(None)
                refused[index] = "its vector is not finite"
        if len(refused) == len(texts):
            raise UserError(f"model {self.name!r}: none of its vectors is finite", "--dtype float32 or bfloat16 may hold them")
        return Answers.of(rows, refused)

    def changed(self, texts: Sequence[str], prompt: str | None, change: Change) -> Vectors:
        """Encode texts with something changed: float32 [n, dimension], rows of NaN where a text then has no token."""
        prompt = self.embedder.spec.default_prompt if prompt is None else prompt
        prompt = prompt if change.prompt is None else change.prompt
        texts = [(change.prefix or "") + text for text in texts]
        vectors = np.full((len(texts), self.embedder.dimension), np.nan, dtype=np.float32)
        with changed(self.embedder, change):
            rows = [
                index for index, length in enumerate(self.embedder.tokenizer.lengths([prompt + text for text in texts])) if length
            ]
            if rows:
                vectors[rows] = self.embedder.encode([texts[index] for index in rows], prompt, progress=False)
        return vectors

    def facts(self) -> Facts:
        """Return what its files say, and what its tokens see as measured."""
        spec, cut = self.embedder.spec, self.cut
        variant = None if self.folder is None else self.folder.variant
        causal = None if self.network is None else is_causal(self.embedder)
        return Facts(
            name=self.name,
            kind=self._kind,
            prompts=self.prompts,
            default_prompt=spec.default_prompt,
            pooling=None if self.folder is None else "+".join([spec.pooling] if isinstance(spec.pooling, str) else spec.pooling),
            max_length=cut.length,
            truncation_side=cut.side,
            attention=None if causal is None else "causal" if causal else "bidirectional",
            dtype=str(self.embedder.dtype).removeprefix("torch.") if isinstance(self.embedder, TorchEmbedder) else None,
            weights=None if variant is None else variant.weights,
        )


@contextmanager
def changed(embedder: BatchedEmbedder, change: Change) -> Iterator[None]:
    """Let an embedder do something otherwise for a while. Pooling and attention can be changed in torch alone."""
    with ExitStack() as stack:
        if (change.specials, change.lowercase, change.cut) != (None, None, None):
            stack.enter_context(_with(embedder, "tokenizer", changed_tokenizer(embedder.tokenizer, change)))
        if change.pool_prompt is not None:
            spec = embedder.spec.model_copy(update={"pool_prompt": change.pool_prompt})
            stack.enter_context(_with(embedder, "spec", spec))
        if change.pooling is not None:
            assert isinstance(embedder, TorchEmbedder)
            stack.enter_context(_with(head_of(embedder.model), "pooling", TokenPooling((change.pooling,))))
        if change.causal is not None:
            assert isinstance(embedder, TorchEmbedder)
            stack.enter_context(_with_mask(backbone_of(embedder.model), change.causal, embedder.dtype))
        yield


@contextmanager
def _with(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _with_mask(backbone: nn.Module, causal: bool, dtype: torch.dtype) -> Iterator[None]:
    """Hand a network of transformers a mask of four dimensions, which it takes as it is instead of making its own."""

    def masked(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = keywords["attention_mask"]
        seen = tokens[:, None, None, :].bool().expand(-1, 1, tokens.shape[1], -1)
        if causal:
            seen = seen & torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).tril()
        mask = torch.zeros(seen.shape, dtype=dtype, device=tokens.device).masked_fill(~seen, torch.finfo(dtype).min)
        return arguments, {**keywords, "attention_mask": mask}

    handle = backbone.register_forward_pre_hook(masked, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def is_causal(embedder: BatchedEmbedder, causal: bool | None = None) -> bool:
    """Whether what a token becomes is the same whatever comes after it; `causal`: under a mask of ours."""
    assert isinstance(embedder, TorchEmbedder)
    rows = embedder.tokenizer(["what comes first", "what comes first and is then followed by more"])
    # The same beginning, another last token: no ids of ours, so that the vocabulary has them.
    ids = torch.from_numpy(rows[1]).repeat(2, 1).to(embedder.device)
    ids[1, -1] = ids[0, 0] if ids[0, 0] != ids[0, -1] else ids[0, 1]
    with changed(embedder, Change(causal=causal)):
        hidden = embedder.hidden(ids, torch.ones_like(ids)).float()
    return bool(torch.allclose(hidden[0, 0], hidden[1, 0], rtol=1e-4, atol=1e-6))


def mask_problem(embedder: TorchEmbedder, causal: bool) -> str | None:
    """Say why a network cannot be given the other mask; None: it can."""
    try:
        took = is_causal(embedder, causal) is causal
    except MASK_ERRORS as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None if took else "its network passes over masks that are handed to it"


def poolings() -> list[Pooling]:
    """Return the poolings that need no weights."""
    return [mode for mode in Pooling if mode in POOLINGS]


class _CutTokenizer(TextTokenizer):
    """A tokenizer that cuts as it is told."""

    def __init__(self, tokenizer: Tokenizer, cut: Cut, spec: EmbedderSpec) -> None:
        super().__init__(tokenizer, cut.length, spec)
        self._tokenizer.enable_truncation(max_length=cut.length, direction=cut.side)


def changed_tokenizer(tokenizer: TextTokenizer, change: Change) -> TextTokenizer:
    """Return a tokenizer that takes texts otherwise than the given one."""
    definition: Mapping[str, Any] = tokenizer.definition()
    settings = definition.get("truncation") or {}
    cut = change.cut or Cut(str(settings.get("direction", "Right")).lower(), tokenizer.max_length)
    spec = tokenizer.spec
    if change.specials is False:
        definition = {**definition, "post_processor": None}
        spec = spec.model_copy(update={"suffix": ""})
    if change.lowercase is not None:
        spec = spec.model_copy(update={"lowercase": change.lowercase})
    return _CutTokenizer(Tokenizer.from_str(json.dumps(definition)), cut, spec)
