"""CUDA graphs for single short texts: the launch of a network's kernels then costs nothing, which is most of a query's latency.

Graphs have fixed shapes, so each is made for a number of tokens, its bucket. A text is run in the smallest bucket that holds it,
filled up by a second text of pad tokens, which attention within texts keeps apart. What is larger runs without a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
from torch import nn

from compress.common.errors import first_line
from compress.models.network.packed import Packed, packed_vectors
from compress.models.network.pooling import PackedRows

BUCKETS = (32, 64, 128, 256, 512)
"""Tokens of the longest text of each bucket."""
FILLER = 16
"""Rows of a graph beyond its bucket, so that the second text always has one. Keeps the rows a multiple of 16."""
WARM_UPS = 3
AGREEMENT = 1e-2
"""Largest difference of a graph's vector from the network's, relative to its length, at which the graph is used."""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
"""Records what a function does on fixed tensors: how to do it again, and the tensor that then holds its result."""


def bucket_of(tokens: int, buckets: Sequence[int] = BUCKETS) -> int | None:
    """Return the smallest bucket that holds so many tokens; None: the largest is too small."""
    return min((bucket for bucket in buckets if bucket >= tokens), default=None)


def filled(packed: Packed, rows: int) -> Packed:
    """Return a batch of one text with a second one of pad tokens, `rows` rows in all; more than the text has. Both on the CPU.

    All pad tokens are at the network's first position: their own could lie beyond its table of positions.
    """
    text = packed.rows
    taken = len(text.text)
    more = torch.zeros(rows - taken, dtype=torch.int64)
    end = torch.tensor([rows])
    both = PackedRows(
        text=torch.cat([text.text, more + 1]),
        positions=torch.cat([text.positions, more]),
        offsets=torch.cat([text.offsets, end.int()]),
        first=torch.cat([text.first, torch.tensor([taken])]),
        stop=torch.cat([text.stop, end]),
    )
    ids, positions = (torch.cat([part, more.unsqueeze(0)], dim=1) for part in (packed.ids, packed.positions))
    return Packed(ids, positions, both, max(taken, rows - taken))


def cuda_graph(run: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
    """Record a CUDA graph of a function.

    Raises:
        RuntimeError: it does what no graph can hold, such as waiting for the device.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which may not be recorded
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph.replay, made


@dataclass(frozen=True)
class _Recorded:
    """A graph and the tensors that it reads and writes."""

    inputs: Packed
    replay: Replay
    output: torch.Tensor


class SmallRequests:
    """Runs single short texts by graphs, each recorded when the first text of its bucket comes, and checked against the network."""

    def __init__(self, network: nn.Module, device: torch.device, capture: Capture, buckets: Sequence[int] = BUCKETS) -> None:
        """Take what to record.

        Args:
            network: the network, set to packed batches.
            device: its device.
            capture: records a graph.
            buckets: tokens of the longest text of each graph.
        """
        self._network, self._device, self._capture, self._buckets = network, device, capture, tuple(buckets)
        self._recorded: dict[int, _Recorded] = {}
        self._lock = threading.Lock()  # a graph's tensors are one text's at a time
        self.refused: str | None = None
        """Why no graph is used; None: they are."""

    @property
    def described(self) -> str:
        """What runs single short texts, for records."""
        if self.refused is not None:
            return f"as it is: no CUDA graph ({self.refused})"
        return f"CUDA graphs of up to {', '.join(map(str, self._buckets))} tokens"

    def __call__(self, packed: Packed) -> torch.Tensor | None:
        """Embed a batch of one text, given on the CPU: float32 [1, dimension].

        None where no graph is for it: several texts, a long one, or one of which nothing is pooled.
        """
        alone = len(packed.rows.first) == 1 and bool(packed.rows.any_pooled.all())
        bucket = bucket_of(packed.ids.shape[1], self._buckets) if alone else None
        if bucket is None or self.refused is not None:
            return None
        staged = filled(packed, bucket + FILLER).to(self._device)
        with self._lock:
            if bucket not in self._recorded:
                self._record(bucket, staged)
            if self.refused is not None:
                return None
            return self._run(self._recorded[bucket], staged)

    def _run(self, recorded: _Recorded, staged: Packed) -> torch.Tensor:
        for there, new in zip(_tensors(recorded.inputs), _tensors(staged), strict=True):
            there.copy_(new)
        recorded.replay()
        return recorded.output[:1].clone()  # the next text overwrites it

    def _record(self, bucket: int, staged: Packed) -> None:
        """Record a bucket's graph; afterwards it agrees with the network, or `refused` says why there is none."""
        # Recorded on other tokens than the first text's, so that the check below sees the graph read what it is given. The longest
        # text is a number in the graph, not a tensor: the largest that may come.
        inputs = Packed(torch.zeros_like(staged.ids), staged.positions.clone(), _cloned(staged.rows), bucket + FILLER)
        on_device = torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()
        try:
            with on_device:  # a graph records the current card's stream
                replay, output = self._capture(lambda: packed_vectors(self._network, inputs))
        except RuntimeError as error:
            self.refused = first_line(error)
            return
        recorded = _Recorded(inputs, replay, output)
        expected = packed_vectors(self._network, staged)[0]
        apart = float((self._run(recorded, staged)[0] - expected).norm() / expected.norm())
        if not apart <= AGREEMENT:
            self.refused = f"its vectors differ from the network's by {apart:.1e}"
            return
        self._recorded[bucket] = recorded


def _cloned(rows: PackedRows) -> PackedRows:
    return PackedRows(*(getattr(rows, field.name).clone() for field in fields(rows)))


def _tensors(packed: Packed) -> list[torch.Tensor]:
    """Return the tensors of a batch in a fixed order."""
    return [packed.ids, packed.positions, *(getattr(packed.rows, field.name) for field in fields(PackedRows))]
