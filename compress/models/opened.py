"""A model that is to be made smaller: its network without values, where its weights lie, how it takes texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from compress.models.anatomy import Sublayer
from compress.models.checkpoint import TensorInfo
from compress.models.shape import ModelShape
from compress.models.spec import EmbedderSpec
from compress.models.tokens import TextTokenizer
from compress.models.weights import Weights


@dataclass(frozen=True)
class OpenModel:
    """A model as it is about to be walked through."""

    network: nn.Module
    """Without values."""
    weights: Weights
    spec: EmbedderSpec
    tokenizer: TextTokenizer
    config: Mapping[str, Any]
    """The `config.json` of what is to be written."""
    layers: tuple[int, ...]
    """Which block of the published model each block is, from 0."""
    heads: int | None = None
    """Attention heads of each block, where it has fewer than its config can say."""
    dropped: tuple[tuple[int, Sublayer], ...] = ()
    """Sublayers that are not there, by block."""

    @property
    def shape(self) -> ModelShape:
        """Its shape as it is now, the config being that of what is to be written."""
        tensors = {name: TensorInfo("F16", tuple(tensor.shape)) for name, tensor in self.network.state_dict().items()}
        return ModelShape(type(self.network).__name__, tensors, self.config, self.layers)
