"""Everything about an embedder except its network: pooling, what comes after it, prompts, lengths. No torch here.

A variant stores it (`variant.json`); of other folders `compress.models.text.sentence_transformers` reads it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from compress.common.errors import UserError

TASKS = ("query", "document")
"""What a text may be embedded for: to search, or to be found."""


class UnknownTask(UserError, ValueError):
    """A task that a model does not know."""


class Pooling(StrEnum):
    """How token vectors become one text vector, by sentence-transformers' names."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "lasttoken"
    MAX = "max"
    MEAN_SQRT = "mean_sqrt_len_tokens"
    WEIGHTED = "weightedmean"


Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
"""How vectors are compared, by sentence-transformers' names; of the last two, the negative distance."""


class HeadModule(BaseModel):
    """A module between pooling and the final vector, as sentence-transformers' `modules.json` lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["Dense", "LayerNorm", "Normalize"]
    width: int | None = None
    """Width of the vectors that it makes; None: as wide as what it is given."""
    inputs: int | None = None
    """Of Dense: width of the vectors that it is given."""
    bias: bool = True
    """Of Dense: whether it has a bias."""
    activation: str = "torch.nn.modules.linear.Identity"
    """Of Dense: class of the activation function, one of torch's own."""
    residual: bool = False
    """Of Dense: whether its input is added to its output, projected where the widths differ."""


class WeightedLayers(BaseModel):
    """sentence-transformers' `WeightedLayerPooling`: tokens are a weighted mean of several blocks' outputs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: int = Field(ge=0)
    """The first hidden states that count: 0 for what enters the first block, n for the output of block n, from 1."""
    blocks: int = Field(ge=1)
    """Number of blocks of the network; the output of the last one is taken after the final norm."""


class EmbedderSpec(BaseModel):
    """Everything about an embedder except its network. It is stored with every variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling | tuple[Pooling, ...] = Pooling.MEAN
    """How tokens are pooled; the results of several modes are concatenated."""
    pool_prompt: bool = True
    """Whether the prompt's own tokens are pooled (sentence-transformers' `include_prompt`)."""
    layers: WeightedLayers | None = None
    """The blocks whose outputs are averaged before they are pooled; None: the last block's output alone is pooled."""
    rotated: bool = False
    """Whether token vectors are rotated, and multiplied by a matrix before they are pooled; see `compress.methods.rotate`."""
    token_width: int | None = None
    """Width of the token vectors; None: the network's hidden size."""
    modules: tuple[HeadModule, ...] = ()
    """What comes after pooling and before the final normalisation."""
    normalize: bool = False
    """Whether vectors are scaled to unit length at the end."""
    dimensions: int | None = None
    """How many leading dimensions of a vector are kept (sentence-transformers' `truncate_dim`); None: all."""
    max_length: int | None = None
    """Longest input in tokens, special tokens counted; None: what the tokenizer or the network's positions allow."""
    truncation_side: Literal["right", "left"] = "right"
    """The end at which longer texts are cut."""
    max_characters: int | None = None
    """Longest text in characters, the prompt counted; longer ones are cut before they are tokenized (model2vec). None: any."""
    skip_unknown: bool = False
    """Whether the tokenizer's unknown token is left out of a text, after the text has been cut (model2vec)."""
    lowercase: bool = False
    """Whether texts are lowercased before they are tokenized. Variants of version 0.1 only: tokenizers now do it themselves."""
    suffix: str = ""
    """String to append to every text before tokenizing. Truncation of a long text removes it."""
    prompt_specials: bool = True
    """Whether the special tokens before a prompt are counted as part of the prompt."""
    similarity: Similarity = "cosine"
    """How the model's vectors are meant to be compared."""
    prompts: dict[str, str] = {}
    """Prompts by name."""
    default_prompt: str = ""
    """The prompt of every text for which the caller names none."""

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """The pooling modes, in the order in which their results are concatenated."""
        return (self.pooling,) if isinstance(self.pooling, Pooling) else self.pooling

    def prompt(self, prompt: str | None = None, task: str | None = None) -> str:
        """Return what is put before every text, as sentence-transformers' `encode`, `encode_query` and `encode_document` choose it.

        Args:
            prompt: what the caller names, verbatim; it comes first.
            task: what the texts are embedded for, one of `TASKS`: its prompt is the one of that name, and none where the model has
                none of that name. None: the default prompt.

        Raises:
            UnknownTask: the task is none of `TASKS`. It is a ValueError.
        """
        if task is not None and task not in TASKS:
            raise UnknownTask(f"task {task!r} is not known", f"known: {', '.join(TASKS)}")
        if prompt is not None:
            return prompt
        # encode_document would look for "passage" and "corpus" too, but never gets there: every SentenceTransformer has a prompt
        # named "document", which is empty where its files name none (6.2). The default prompt is for texts without a task.
        return self.default_prompt if task is None else self.prompts.get(task, "")

    def dimension(self, hidden_size: int) -> int:
        """Return the width of the vectors that a network of this hidden size gives."""
        width = len(self.poolings) * (self.token_width or hidden_size)
        for module in self.modules:
            width = module.width or width
        return min(width, self.dimensions or width)
