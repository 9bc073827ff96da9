"""An embedder that runs a network in torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from compress.common.errors import UserError
from compress.common.memory import available_memory_bytes, gigabytes
from compress.layers.compressed import CompressedLayer
from compress.models.embedder import BatchedEmbedder, Vectors, with_progress
from compress.models.folder import ModelFolder
from compress.models.network.packed import has_kernel, packed_vectors, prepared, set_packed
from compress.models.network.pooling import backbone_of, head_of, hidden_of
from compress.models.text.packed import PackedBatch, consecutive, pack
from compress.models.text.tokens import Batch, Ids
from compress.runtimes.contract import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, PACKED, PADDED, Batching, packed_budget
from compress.runtimes.small_requests import SmallRequests, cuda_graph

if TYPE_CHECKING:
    from compress.models.text.tokens import TextTokenizer

TRIAL_TEXTS = ("a", "a parcel", "the parcel never came, and nobody knew why; rain by the evening, they said")
"""Texts that a network is tried with before it is packed."""
LONGEST_TRIAL = 4_224
"""Words of the longest text of the trial, which is longer than the sliding windows of most networks."""


class TorchEmbedder(BatchedEmbedder):
    """An embedder that runs a network and its head in torch."""

    why_padded: str | None
    """Why batches are padded; None: texts are packed end to end."""

    def __init__(
        self,
        folder: ModelFolder,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        batching: Batching = "padded",
    ) -> None:
        """Wrap a network.

        Args:
            folder: the model's folder, which says how the model takes texts.
            model: the network, which must be on `device` already.
            device: the device on which it runs.
            dtype: its compute dtype.
            batching: `padded`; `packed`, without padding, for which the network is changed so that it takes no padded batches any
                more; or `auto`: packed on a CUDA card, if the network gives the same hidden states.

        Raises:
            UserError: `batching` is `packed`, and the network cannot be.
        """
        batch_tokens = CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS
        super().__init__(folder.name, folder.spec, folder.tokenizer, folder.dimension, batch_tokens)
        self.model = model.eval()
        self.device = device
        self.dtype = dtype
        self._small: SmallRequests | None = None
        self.why_padded = self._choose(batching)
        self._folder = folder
        self._on_card = self.why_padded is None and device.type == "cuda"
        if self._on_card:
            self._fill_batches()
            self._small = SmallRequests(self.model, device, cuda_graph)

    def _fill_batches(self) -> None:
        """Let packed batches on a card take a share of its free memory."""
        self.batch_tokens = packed_budget(self._free_bytes(), self._folder.shape.activation_bytes(1, self.dtype.itemsize))

    def _free_bytes(self) -> int:
        if self.device.type != "cuda":
            return available_memory_bytes()
        torch.cuda.empty_cache()  # what torch keeps of tensors that are gone is free too
        return int(torch.cuda.mem_get_info(self.device)[0])

    def _choose(self, batching: Batching) -> str | None:
        """Set the network to packed batches if that is asked for and possible; return why not."""
        if batching == PADDED:
            return "asked for"
        if batching != PACKED and not has_kernel(self.device, self.dtype):
            return f"no kernel for packed attention on {self.device.type} in {str(self.dtype).removeprefix('torch.')}"
        why = set_packed(self.model, trial_rows(self.tokenizer, self.model), self.device, self.dtype)
        if why is not None and batching == PACKED:
            raise UserError(f"model {self.name!r}: cannot run packed batches: {why}", "batching: padded, or auto")
        return why

    @property
    def batching(self) -> str:
        """How texts share a batch: `packed` or `padded`."""
        return PADDED if self.why_padded is not None else PACKED

    @property
    def small_requests(self) -> str:
        """What runs a single short text: CUDA graphs by number of tokens, or the network as it is and why."""
        return "as it is" if self._small is None else self._small.described

    def embed(self, rows: Sequence[Ids], budget: int, pool_from: int, show: bool) -> Vectors:
        """Embed tokenized texts in batches of at most `budget` tokens; see `TextEmbedder.embed`."""
        if self.why_padded is not None:
            return super().embed(rows, budget, pool_from, show)
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        parts = list(consecutive([len(row) for row in rows], budget))
        batches = [pack(rows[part]) for part in parts]
        for part, made in zip(parts, self._packed(batches, pool_from, show), strict=True):
            self.check_width(made)
            vectors[part] = made
        return vectors

    def _packed(self, batches: Sequence[PackedBatch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed packed batches and yield the vectors of each in order. A card gets a batch before the last one is waited for."""
        waiting: torch.Tensor | None = None
        for batch in with_progress(batches, "encoding", show):
            made = self._embed_packed(batch, pool_from)
            if waiting is not None:
                yield waiting.cpu().numpy()
            waiting = made
        if waiting is not None:
            yield waiting.cpu().numpy()

    @torch.inference_mode()
    def _embed_packed(self, batch: PackedBatch, pool_from: int) -> torch.Tensor:
        packed = prepared(batch, self.model, pool_from)
        made = None if self._small is None else self._small(packed)
        return packed_vectors(self.model, packed.to(self.device)) if made is None else made

    def forward(self, batches: Sequence[Batch], pool_from: int, show: bool) -> Iterator[Vectors]:
        """Embed padded batches; see `BatchedEmbedder.forward`."""
        for ids, mask in with_progress(batches, "encoding", show):
            yield self._embed(torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device), pool_from)

    @torch.inference_mode()
    def _embed(self, ids: torch.Tensor, mask: torch.Tensor, pool_from: int) -> Vectors:
        vectors: Vectors = self.pool(self.hidden(ids, mask), mask, pool_from).cpu().numpy()
        return vectors

    @property
    def threads(self) -> int:
        """Number of CPU threads that compute."""
        return torch.get_num_threads()

    def compile(self) -> None:
        """Run the backbone through `torch.compile` from now on. The head is not compiled; it is only a few operations."""
        backbone_of(self.model).compile(dynamic=True)
        self._small = None  # graphs of what is compiled would be the compiler's to make

    def unpack(self) -> None:
        """Unpack the weights of layers that take floating-point inputs, once, where each call unpacks them otherwise.

        The vectors stay the same, bit for bit. The values take what a model in the compute dtype takes, which few bits are there to
        save, so nothing unpacks by itself. A CUDA card keeps the packed weights too: up to 64 tokens it multiplies these.

        Raises:
            UserError: no layer has such weights, or the values do not fit in the free memory.
        """
        layers = [module for module in self.model.modules() if isinstance(module, CompressedLayer)]
        needed, free = sum(layer.unpacked_bytes(self.dtype) for layer in layers), self._free_bytes()
        if not needed:
            raise UserError(f"model {self.name!r}: no layer unpacks integer weights; there is nothing to unpack")
        if needed > free:
            raise UserError(
                f"model {self.name!r}: takes {gigabytes(needed)} of memory unpacked, {gigabytes(free)} are free", "leave it packed"
            )
        for layer in layers:
            layer.unpack(self.dtype)
        if self._on_card:
            self._fill_batches()
        if self._small is not None:
            self._small = SmallRequests(self.model, self.device, cuda_graph)  # recorded ones unpack

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the backbone on a padded batch, if batches are padded.

        Args:
            ids: int64 [texts, length].
            mask: int64 [texts, length], 1 for tokens.

        Returns:
            What the head is given, [texts, length, width].
        """
        return hidden_of(self.model, ids, mask)

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor, pool_from: int) -> torch.Tensor:
        """Run the head.

        Args:
            hidden: hidden states, [texts, length, width].
            mask: int64 [texts, length], 1 for tokens.
            pool_from: position of the first token to pool.

        Returns:
            float32 [texts, dimension].
        """
        pooled = mask
        if pool_from:
            pooled = mask.clone()
            pooled[:, :pool_from] = 0
        vectors: torch.Tensor = head_of(self.model)(hidden, mask, pooled)
        return vectors


def trial_rows(tokenizer: TextTokenizer, model: nn.Module) -> list[Ids]:
    """Return ids to try a network's packed batches with, one text longer than its sliding window where the model takes such."""
    config = getattr(backbone_of(model), "config", None)
    windows = [getattr(config, name, None) or 0 for name in ("sliding_window", "local_attention")]
    words = min(max(windows) + 8, LONGEST_TRIAL)
    limit = tokenizer.max_length if tokenizer.positions is None else tokenizer.positions
    rows = tokenizer([*TRIAL_TEXTS, "parcel " * words])
    return [row[:limit] for row in rows if len(row)]
