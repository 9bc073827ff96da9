"""Rows on NV-Embed-v2 at full size: batches of 512 tokens and of real lengths, padding, the published way, and single queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from statistics import median
from typing import Any

import torch
from networks import (
    folded,
    packed_batch,
    packed_form,
    padded_batch,
    products_per_token,
    random_network,
    random_rows,
    ready,
    sharing,
    vocabulary,
)
from nv_original import OriginalStyle
from timing import in_turn, peak_rates, percentile, ratio

from compress.methods.base import Method
from compress.methods.quantize.bitsandbytes import BitsAndBytes
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.models.network.nv_embed import NVEmbedNetwork
from compress.models.network.packed import packed_vectors
from compress.models.text.packed import pack
from compress.models.text.tokens import Ids
from compress.runtimes.small_requests import SmallRequests, cuda_graph

Row = dict[str, Any]
CALIBRATION_TEXTS = 512
METHODS: dict[str, Method | None] = {
    "bf16": None,
    "fp8": FP8(),
    "int8": RTN(),
    "int8-weights": RTN(activations="none"),
    "int4-weights": RTN(bits=4, group_size=64, activations="none"),
    "nf4": BitsAndBytes(format="nf4"),
    "llm-int8": BitsAndBytes(format="llm-int8"),
}
"""How the blocks are stored, by the name of the row."""


@dataclass
class Bench:
    """The device, the sizes, and the networks, each made when it is first asked for."""

    device: torch.device
    small: bool
    _ways: dict[str, NVEmbedNetwork] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is not quantized: bfloat16 on a card; a CPU stands in with float32."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return 256 if self.small else 16_384

    @property
    def rounds(self) -> int:
        """Rounds of a comparison."""
        return 2 if self.small else 7

    @cached_property
    def rates(self) -> dict[str, float | str]:
        """What the card multiplies, in operations per second."""
        return peak_rates(self.device, 128 if self.small else 8192, self.rounds)

    @cached_property
    def network(self) -> NVEmbedNetwork:
        """The network as published, its weights random."""
        return random_network(self.device, self.dtype, small=self.small)

    @cached_property
    def _folded(self) -> NVEmbedNetwork:
        return folded(self.network, self.dtype)

    def way(self, name: str) -> NVEmbedNetwork:
        """Return the folded network, its blocks stored as `METHODS` says, set to packed batches."""
        if name not in self._ways:
            self._ways[name] = packed_form(ready(self._folded, METHODS[name], self.device, self.dtype), self.device, self.dtype)
        return self._ways[name]

    def forget(self, *names: str) -> None:
        """Free the memory of ways that no further row needs."""
        for name in names:
            self._ways.pop(name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows_of(self, lengths: Sequence[int]) -> list[Ids]:
        """Draw texts of given lengths."""
        return random_rows(list(lengths), vocabulary(self.network))

    def real_lengths(self) -> list[int]:
        """Lengths in tokens of the package's calibration texts, by nano's tokenizer, until they fill a batch."""
        from compress.data.texts import texts_to_calibrate
        from compress.models.source import find

        lengths: list[int] = []
        tokenizer = find("nano").tokenizer
        for row in tokenizer(texts_to_calibrate("embedded", CALIBRATION_TEXTS, 0)):
            if sum(lengths) + len(row) > self.tokens:
                break
            lengths.append(len(row))
        return lengths


def _speed(bench: Bench, lengths: Sequence[int], names: Sequence[str]) -> Row:
    """Time ways in turn on one packed batch."""
    rows = bench.rows_of(lengths)
    calls: dict[str, Callable[[], object]] = {}
    for name in names:
        network = bench.way(name)
        calls[name] = partial(packed_vectors, network, packed_batch(rows, network, bench.device))
    times = in_turn(calls, bench.device, bench.rounds)
    total = sum(lengths)
    operations = sum(length * products_per_token(bench.network, length) for length in lengths)
    peak = bench.rates["bfloat16" if bench.dtype == torch.bfloat16 else "float32"]
    assert isinstance(peak, float)
    return {
        "texts": len(lengths),
        "tokens": total,
        "longest": max(lengths),
        "tokens_per_second": {name: total / median(times[name]) for name in names},
        "share_of_peak": {name: operations / median(times[name]) / peak for name in names},
        "times_bf16": {name: ratio(times, "bf16", name) for name in names if name != "bf16"},
        "seconds": times,
    }


def products(bench: Bench) -> Iterator[Row]:
    """What the card multiplies: the ceiling of all rows."""
    yield {"operations_per_second": bench.rates}


def sparse_products(bench: Bench) -> Iterator[Row]:
    """Products of weights with 2 of 4 zeros through torch's semi-structured kernels against dense ones, for the model's shapes."""
    if bench.device.type != "cuda":
        yield {"skipped": f"no 2:4 products on {bench.device.type}"}
        return
    from torch.sparse import to_sparse_semi_structured

    x = torch.randn(bench.tokens, 4096, device=bench.device, dtype=bench.dtype)
    for outputs in (6_144, 28_672):
        dense = torch.randn(outputs, 4096, device=bench.device, dtype=bench.dtype)
        dense.view(-1, 4)[:, 2:] = 0
        sparse = to_sparse_semi_structured(dense)
        with torch.inference_mode():
            apart = float((x[:64] @ dense.t() - torch.nn.functional.linear(x[:64], sparse)).abs().max())
        times = in_turn(
            {"dense": partial(torch.nn.functional.linear, x, dense), "2:4": partial(torch.nn.functional.linear, x, sparse)},
            bench.device,
            bench.rounds,
        )
        yield {"outputs": outputs, "inputs": 4096, "times_dense": ratio(times, "dense", "2:4"), "largest_difference": apart}


def equal_lengths(bench: Bench) -> Iterator[Row]:
    """Ids to vectors at 512 tokens, packed."""
    length = 64 if bench.small else 512
    yield _speed(bench, [length] * (bench.tokens // length), ["bf16", "fp8", "int8"])


def real_lengths(bench: Bench) -> Iterator[Row]:
    """Ids to vectors on texts of real lengths, packed."""
    yield _speed(bench, bench.real_lengths(), ["bf16", "fp8", "int8"])


def padding(bench: Bench) -> Iterator[Row]:
    """Packed batches against padded ones of texts sorted by length, on mixed lengths."""
    draw = torch.Generator().manual_seed(0)
    most = 64 if bench.small else 512
    lengths: list[int] = []
    while sum(lengths) + most <= 2 * bench.tokens:
        lengths.append(int(most ** torch.rand((), generator=draw).item() + 3))
    rows = sorted(bench.rows_of(lengths), key=len)
    padded = ready(bench._folded, None, bench.device, bench.dtype)
    batches, batch = [], []  # type: ignore[var-annotated]
    for row in rows:  # the longest text of a batch comes last
        if batch and len(row) * (len(batch) + 1) > bench.tokens:
            batches.append(padded_batch(batch, bench.device))
            batch = []
        batch.append(row)
    batches.append(padded_batch(batch, bench.device))
    packed = bench.way("bf16")
    half = len(rows) // 2
    ends = [packed_batch(part, packed, bench.device) for part in (rows[:half], rows[half:]) if part]
    times = in_turn(
        {
            "padded": lambda: [padded(ids, mask, mask) for ids, mask in batches],
            "packed": lambda: [packed_vectors(packed, part) for part in ends],
        },
        bench.device,
        bench.rounds,
    )
    tokens = sum(lengths)
    filled = sum(ids.numel() for ids, _ in batches)
    yield {
        "texts": len(lengths), "tokens": tokens, "padded_tokens": filled,
        "tokens_per_second": {name: tokens / median(taken) for name, taken in times.items()},
        "packed_times_padded": ratio(times, "padded", "packed"),
    }  # fmt: skip


def published(bench: Bench) -> Iterator[Row]:
    """The published way (eager attention, keys and values of the latents for every text) against ours, at 64 tokens."""
    length = 32 if bench.small else 64
    rows = bench.rows_of([length] * (bench.tokens // length // 2))
    theirs = sharing(bench.network)
    theirs.embedding_model.config._attn_implementation = "eager"
    original = OriginalStyle(theirs).eval()
    ids, mask = padded_batch(rows, bench.device)
    ours = bench.way("bf16")
    batch = packed_batch(rows, ours, bench.device)
    with torch.inference_mode():
        cosine = float(torch.cosine_similarity(original(ids, mask, mask).float(), packed_vectors(ours, batch).float()).min())
    times = in_turn(
        {"published": lambda: original(ids, mask, mask), "ours": partial(packed_vectors, ours, batch)}, bench.device, bench.rounds
    )
    yield {"tokens_each": length, "texts": len(rows), "times_published": ratio(times, "published", "ours"), "lowest_cosine": cosine}


def one_query(bench: Bench) -> Iterator[Row]:
    """Latency of one query of 32 tokens, ids to vector on the host, in CUDA graphs where the device has them."""
    from compress.models.network.packed import prepared

    rows = bench.rows_of([32])
    names = ["bf16", "int8-weights", "int4-weights"]
    calls: dict[str, Callable[[], object]] = {}
    graphs: dict[str, str] = {}
    for name in names:
        network = bench.way(name)
        small = SmallRequests(network, bench.device, cuda_graph) if bench.device.type == "cuda" else None

        def call(network: NVEmbedNetwork = network, small: SmallRequests | None = small) -> object:
            packed = prepared(pack(rows), network, 0)
            made = None if small is None else small(packed)
            return (packed_vectors(network, packed.to(bench.device)) if made is None else made).cpu()

        calls[name] = call
        with torch.inference_mode():
            call()
        graphs[name] = "as it is" if small is None else small.described
    times = in_turn(calls, bench.device, 3 if bench.small else 200, warm_up=1 if bench.small else 10)
    yield {
        "tokens": 32,
        "milliseconds_p50": {name: 1e3 * percentile(taken, 0.5) for name, taken in times.items()},
        "milliseconds_p99": {name: 1e3 * percentile(taken, 0.99) for name, taken in times.items()},
        "of_bf16": {name: 1 / ratio(times, "bf16", name) for name in names[1:]},
        "small_requests": graphs,
    }
    bench.forget("int8-weights", "int4-weights")


def text_to_vector(bench: Bench) -> Iterator[Row]:
    """Texts to vectors (nano's tokenizer included) against ids to vectors, on the calibration texts."""
    from compress.data.texts import texts_to_calibrate
    from compress.models.source import find

    tokenizer = find("nano").tokenizer
    network = bench.way("bf16")
    texts = texts_to_calibrate("embedded", CALIBRATION_TEXTS, 0)[: len(bench.real_lengths())]
    limit = vocabulary(network)
    known = [row % limit for row in tokenizer(texts)]

    def from_texts() -> object:
        rows = [row % limit for row in tokenizer(texts)]
        return packed_vectors(network, packed_batch(rows, network, bench.device)).cpu()

    def from_ids() -> object:
        return packed_vectors(network, packed_batch(known, network, bench.device)).cpu()

    times = in_turn({"texts": from_texts, "ids": from_ids}, bench.device, bench.rounds)
    tokens = sum(map(len, known))
    yield {
        "texts": len(texts), "tokens": tokens, "rate_of_ids": ratio(times, "texts", "ids") ** -1,
        "tokens_per_second": {name: tokens / median(taken) for name, taken in times.items()},
    }  # fmt: skip


def bitsandbytes(bench: Bench) -> Iterator[Row]:
    """NF4 and LLM.int8 next to ours, where bitsandbytes is installed."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        yield {"skipped": "bitsandbytes is not installed"}
        return
    length = 64 if bench.small else 512
    for name in ("nf4", "llm-int8"):
        yield {"format": name} | _speed(bench, [length] * (bench.tokens // length), ["bf16", name])
        bench.forget(name)
