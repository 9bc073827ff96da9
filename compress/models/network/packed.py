"""Packed batches through transformers' networks: texts end to end, positions anew in each, attention within each text only.

A network takes part by transformers' attention interface, so no architecture is written anew. On a CUDA card attention is
`torch.nn.attention.varlen` (FlashAttention-2: Dao 2023, arXiv 2307.08691), elsewhere torch's attention, text by text.

No table lists what can be packed. A network is tried, and packed if its hidden states are those of its padded form.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from compress.common.errors import first_line
from compress.models.network.pooling import PackedRows, backbone_of, head_of, hidden_of
from compress.models.text.packed import PackedBatch, pack
from compress.models.text.tokens import Ids, pad_batch

IMPLEMENTATION = "compress_packed"
"""Name under which transformers knows this attention. It has no mask function there, so networks make no mask for it."""
USUAL = "sdpa"
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a trial's hidden states, relative to their size, at which both forms count as one network."""
HALVES = (torch.float16, torch.bfloat16)
TRIAL_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
"""What networks and kernels raise that cannot be packed."""


class PackingError(RuntimeError):
    """A network asks for an attention that packed batches do not have."""


@dataclass(frozen=True)
class Packed:
    """A packed batch on its device."""

    ids: torch.Tensor
    """int64 [1, rows]: to a network, a batch of one text."""
    positions: torch.Tensor
    """Positions as the network counts them, int64 [1, rows]."""
    rows: PackedRows
    longest: int
    """Rows of the longest text, or more."""

    def to(self, device: torch.device) -> Packed:
        """Copy the batch to a device, without waiting for what the device still has to do."""
        rows = PackedRows(*(_sent(getattr(self.rows, field.name), device) for field in fields(PackedRows)))
        return Packed(_sent(self.ids, device), _sent(self.positions, device), rows, self.longest)


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def prepared(batch: PackedBatch, network: nn.Module, pool_from: int) -> Packed:
    """Return a packed batch as a network takes it, on the CPU.

    Args:
        batch: the batch.
        network: the network, whose table of positions says from where it counts.
        pool_from: position of the first pooled token; earlier ones are a prompt that is not pooled.
    """
    offsets = torch.from_numpy(batch.offsets)
    starts, lengths = offsets[:-1].long(), torch.from_numpy(batch.lengths)
    text = torch.repeat_interleave(torch.arange(len(starts)), offsets.diff().long())
    rows = PackedRows(text, torch.from_numpy(batch.positions), offsets, starts + pool_from, starts + lengths)
    ids = torch.from_numpy(batch.ids)
    return Packed(ids.unsqueeze(0), network_positions(network, ids, rows).unsqueeze(0), rows, batch.longest)


def network_positions(network: nn.Module, ids: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    """Return the positions that a network's own code gives to tokens, int64 [rows]; everything is on the CPU.

    RoBERTa and its kin count from the row after the pad token's in their table of positions, and pass over pad tokens in a text.
    """
    table = getattr(getattr(backbone_of(network), "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if padding is None:
        return rows.positions
    counted = ids != padding
    seen = counted.long().cumsum(0)
    starts = rows.offsets[:-1].long()
    before = seen[starts] - counted[starts].long()
    numbered: torch.Tensor = (seen - before[rows.text]) * counted + padding
    return numbered


def packed_hidden(network: nn.Module, packed: Packed) -> torch.Tensor:
    """Return what a network's head is given for a packed batch, [rows, width]; the network must be set to `IMPLEMENTATION`."""
    layers = head_of(network).layers
    made = backbone_of(network)(
        input_ids=packed.ids,
        position_ids=packed.positions,
        # The names that transformers hands on to attention, in networks that can run without padding.
        cu_seq_lens_q=packed.rows.offsets,
        cu_seq_lens_k=packed.rows.offsets,
        max_length_q=packed.longest,
        max_length_k=packed.longest,
        **({} if layers is None else {"output_hidden_states": True}),
    )
    hidden: torch.Tensor = made.last_hidden_state if layers is None else layers(made.hidden_states)
    return hidden[0]


def packed_vectors(network: nn.Module, packed: Packed) -> torch.Tensor:
    """Embed a packed batch: float32 [texts, dimension]."""
    return head_of(network).packed(packed_hidden(network, packed), packed.rows)


# ---------------------------------------------------------------------------------------------------------------- attention


@dataclass(frozen=True)
class _Call:
    """What one attention layer asks for."""

    offsets: torch.Tensor
    longest: int
    scale: float
    causal: bool
    reach: int | None
    """How far from itself a token sees, in tokens; None: any distance."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each text of a packed batch; transformers calls it for networks that are set to `IMPLEMENTATION`.

    Args:
        module: the attention layer.
        query: [1, heads, rows, head width].
        key: [1, key heads, rows, head width].
        value: as `key`.
        attention_mask: None; networks that make a mask of their own cannot be packed.
        **asked: transformers' names: `scaling`, `sliding_window`, `is_causal`, offsets and longest text.

    Returns:
        [1, rows, heads, head width], and no weights.

    Raises:
        PackingError: the layer asks for more than attention within texts, or the network lost the offsets on the way.
    """
    call = _call_of(module, query, attention_mask, asked)
    kernel = _varlen if _has_varlen(query) else _text_by_text
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    made = kernel(query, key, value, call)
    return made.unsqueeze(0), None


def _call_of(module: nn.Module, query: torch.Tensor, mask: Any, asked: dict[str, Any]) -> _Call:
    offsets = asked.get("cu_seq_lens_q")
    if offsets is None:
        raise PackingError("its attention is not given the offsets of the texts")
    if mask is not None:
        raise PackingError("it makes an attention mask of its own")
    for name in ("position_bias", "softcap", "s_aux"):
        if asked.get(name) is not None:
            raise PackingError(f"its attention changes the scores ({name})")
    if asked.get("dropout"):
        raise PackingError("its attention drops weights at random, as in training")
    own = bool(getattr(module, "is_causal", True))
    said = asked.get("is_causal")
    config = getattr(module, "config", None)
    # As transformers' masks: a config that is not causal overrides the layer.
    causal = (own if said is None else bool(said)) and (not own or getattr(config, "is_causal", True) is not False)
    window = asked.get("sliding_window")
    # A window of n is the token and n - 1 before it; in a layer made for causal attention that sees both ways, n on each side.
    reach = None if window is None else int(window) - int(causal or not own)
    scale = asked.get("scaling")
    return _Call(offsets, int(asked["max_length_q"]), query.shape[-1] ** -0.5 if scale is None else float(scale), causal, reach)


def _text_by_text(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call) -> torch.Tensor:
    """Attend with torch's own attention, one text after another: [rows, heads, head width] to the same. The reference."""
    made = torch.empty((*query.shape[:2], value.shape[-1]), dtype=query.dtype, device=query.device)
    bounds = call.offsets.tolist()
    for start, stop in pairwise(bounds):
        ours, keys, values = (part[start:stop].transpose(0, 1)[None] for part in (query, key, value))
        mask = _window(stop - start, call, query.device)
        mixed = F.scaled_dot_product_attention(
            ours,
            keys,
            values,
            attn_mask=mask,
            is_causal=call.causal and mask is None,
            scale=call.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        made[start:stop] = mixed[0].transpose(0, 1)
    return made


def _window(length: int, call: _Call, device: torch.device) -> torch.Tensor | None:
    """Return which tokens see which, bool [length, length], True where they do; None where the window is no limit."""
    if call.reach is None or length <= call.reach + 1:
        return None
    place = torch.arange(length, device=device)
    away = place[:, None] - place[None, :]
    return (away <= call.reach) & (away >= (0 if call.causal else -call.reach))


@cache
def _varlen_attn() -> tuple[Callable[..., Any], frozenset[str]] | None:
    """Return torch's attention over offsets and the names of its arguments, which differ by version; None: this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def _has_varlen(query: torch.Tensor) -> bool:
    return query.is_cuda and query.dtype in HALVES and _varlen_attn() is not None


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call) -> torch.Tensor:
    """Attend with `torch.nn.attention.varlen`: [rows, heads, head width] to the same."""
    found = _varlen_attn()
    assert found is not None, "asked before"
    attention, takes = found
    extra: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in takes:
            extra["enable_gqa"] = True
        else:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if "scale" in takes:
        extra["scale"] = call.scale
    elif call.scale != query.shape[-1] ** -0.5:  # the kernel's own scale is divided out
        query = query * (call.scale * query.shape[-1] ** 0.5)
    if "window_size" in takes:
        left = -1 if call.reach is None else call.reach
        extra["window_size"] = (left, 0 if call.causal else left)
    elif call.reach is not None:
        raise PackingError(f"torch {torch.__version__} has no sliding window in its attention over offsets")
    else:
        extra["is_causal"] = call.causal
    made: torch.Tensor = attention(query, key, value, call.offsets, call.offsets, call.longest, call.longest, **extra)
    return made


AttentionInterface.register(IMPLEMENTATION, attend)


# -------------------------------------------------------------------------------------------------------------------- trial


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention over offsets runs as one kernel on a device: on CUDA, in half precision, in a torch that has it."""
    return device.type == "cuda" and dtype in HALVES and _varlen_attn() is not None


@torch.inference_mode()
def set_packed(network: nn.Module, texts: Sequence[Ids], device: torch.device, dtype: torch.dtype) -> str | None:
    """Set a network to packed batches if it gives the same hidden states with them; it takes no padded ones afterwards.

    Args:
        network: the network, on its device.
        texts: ids of texts of several lengths to try it with, int64 [length]; one longer than a sliding window shows the window.
        device: the device.
        dtype: the compute dtype.

    Returns:
        None once it is set; else why it stays padded.
    """
    backbone = backbone_of(network)
    config: Any = getattr(backbone, "config", None)
    if getattr(config, "_attn_implementation", None) == IMPLEMENTATION:
        return None  # it shares a backbone that was set before
    if not getattr(backbone, "_supports_attention_backend", False) or getattr(config, "_attn_implementation", None) != USUAL:
        return "its attention is not replaceable: it adds terms of its own to the scores, or was written before the interface"
    ids, mask = (torch.from_numpy(part).to(device) for part in pad_batch(texts))
    expected = hidden_of(network, ids, mask)[mask.bool()]
    config._attn_implementation = IMPLEMENTATION
    problem = _difference(network, texts, expected, device, dtype)
    if problem is not None:
        config._attn_implementation = USUAL
    return problem


def _difference(
    network: nn.Module, texts: Sequence[Ids], expected: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> str | None:
    """Say how packed hidden states differ from padded ones, [tokens, width] of all texts; None: they do not."""
    try:
        hidden = packed_hidden(network, prepared(pack(texts), network, 0).to(device))
    except TRIAL_ERRORS as error:
        return first_line(error)
    lengths = [len(text) for text in texts]
    ours, theirs = (torch.split(part.float(), lengths) for part in (hidden, expected))  # type: ignore[no-untyped-call]
    apart = max(float((made - right).norm() / right.norm()) for made, right in zip(ours, theirs, strict=True))
    if apart <= TOLERANCES[dtype]:  # not-a-number is a difference too
        return None
    return f"its packed hidden states are not its padded ones (relative difference {apart:.1e})"
