"""What methods learn from texts: the inputs of a segment's linear layers, token by token, and statistics of them.

Padding never enters a statistic: rows are taken by the batch's mask before anything else sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn

from compress.errors import UserError
from compress.layers.float_layers import linear
from compress.models.embedder import Batch
from compress.models.nv_embed import NVEmbedNetwork
from compress.models.segments import Kind, Parts, Segment, replaced
from compress.models.tokens import Ids, TextTokenizer, batches_by_tokens, pad_batch
from compress.walk import Carry

# Padded tokens a batch holds: little enough that a 7B's widest activations stay below a gigabyte.
BATCH_TOKENS = 2_048

See = Callable[[str, torch.Tensor, torch.Tensor], None]
"""Told the layer that leads those with one input, its rows, float [n, in], and what each of them counts, float32 [n]."""


class Statistic(Protocol):
    """Something that is gathered from rows, a few at a time."""

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        ...


S = TypeVar("S", bound=Statistic)


@dataclass(frozen=True)
class CalibrationTexts:
    """Texts as batches, and of each batch which tokens the model pools."""

    batches: list[Batch]
    pooled: list[Ids]
    """int64 [texts, length], 1 for tokens that are pooled, 0 for padding and for a prompt that is not."""

    @property
    def tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return int(sum(mask.sum() for _, mask in self.batches))


def calibration_batches(
    tokenizer: TextTokenizer, texts: Sequence[str], prompts: Sequence[str], *, pool_prompt: bool, max_tokens: int
) -> CalibrationTexts:
    """Tokenize texts, each with one of the prompts in turn, and batch them.

    Args:
        tokenizer: the model's.
        texts: the texts.
        prompts: put before them, the first before the first text, and so on, over and over.
        pool_prompt: whether the model pools the prompt's tokens.
        max_tokens: texts are cut here, their prompts included.

    Raises:
        UserError: a prompt leaves no token of a text.
    """
    prompts = list(prompts) or [""]
    lengths = {prompt: 0 if pool_prompt or not prompt else tokenizer.prompt_length(prompt) for prompt in prompts}
    given = [prompts[index % len(prompts)] for index in range(len(texts))]
    rows = [row[:max_tokens] for row in tokenizer([prompt + text for prompt, text in zip(given, texts, strict=True)])]
    for prompt, row in zip(given, rows, strict=True):
        if len(row) <= lengths[prompt]:
            raise UserError(
                f"calibration: {max_tokens} tokens leave none of a text behind the prompt {prompt!r}", "raise max_tokens"
            )
    batches, pooled = [], []
    for chosen in batches_by_tokens([len(row) for row in rows], BATCH_TOKENS):
        ids, mask = pad_batch([rows[index] for index in chosen])
        starts = np.array([lengths[given[index]] for index in chosen])
        batches.append((ids, mask))
        pooled.append(mask * (np.arange(mask.shape[1])[None] >= starts[:, None]))
    return CalibrationTexts(batches, pooled)


class Inputs:
    """The calibration texts as they arrive at a segment."""

    def __init__(self, carry: Carry, texts: CalibrationTexts, index: int, segment: Segment) -> None:
        """Take the texts where the walk has them."""
        self._carry, self._texts, self._index, self._segment = carry, texts, index, segment

    def see(
        self, parts: Parts, layers: Mapping[str, nn.Module], told: See, *, pooled_only: bool = False
    ) -> dict[str, tuple[str, ...]]:
        """Run the segment on all texts and tell what its layers are given.

        Args:
            parts: the segment's modules.
            layers: modules inside of them, by name. Those that are given one and the same tensor are told once, as the first.
            told: called for each batch and each such group.
            pooled_only: tokens count as much as in their text's mean: those that are pooled 1 / their number, others nothing.

        Returns:
            The layers of each group, by the one that leads it.

        Raises:
            ValueError: a layer is never called, or given something that is not finite.
        """
        groups: dict[str, list[str]] = {}
        for batch in range(len(self._texts.batches)):
            caught: dict[str, torch.Tensor] = {}
            with ExitStack() as hooks:
                for name, layer in layers.items():
                    hooks.callback(layer.register_forward_pre_hook(_keeping(caught, name, len(layers))).remove)
                with suppress(_AllSeen):
                    self._run(parts, batch)
            if not groups:
                groups = _grouped(caught)
                if missing := layers.keys() - caught.keys():
                    raise ValueError(f"{sorted(missing)[0]} is never called when its segment runs")
            for leader in groups:
                rows, counts = self._rows(caught[leader], batch, pooled_only)
                if not torch.isfinite(rows).all():
                    raise ValueError(f"the input of {leader} on the calibration texts holds NaN or infinity")
                told(leader, rows, counts)
        return {leader: tuple(names) for leader, names in groups.items()}

    def gather(
        self, parts: Parts, layers: Mapping[str, nn.Module], make: Callable[[int, torch.device], S], *, pooled_only: bool = False
    ) -> tuple[dict[str, tuple[str, ...]], dict[str, S]]:
        """Gather a statistic of each input: `make` it from the input's width and device; see `see` for the rest.

        Returns:
            The layers of each group, and each group's statistic, both by the layer that leads it.
        """
        found: dict[str, S] = {}

        def told(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
            if leader not in found:
                found[leader] = make(rows.shape[1], rows.device)
            found[leader].add(rows, counts)

        return self.see(parts, layers, told, pooled_only=pooled_only), found

    def sample(self, parts: Parts) -> torch.Tensor:
        """Return what the segment answers for the batch of the shortest texts: hidden states, or vectors where it is the head."""
        return self._run(parts, len(self._texts.batches) - 1)

    def _run(self, parts: Parts, batch: int) -> torch.Tensor:
        if self._segment.kind is not Kind.HEAD:
            return self._carry.through(self._index, parts, batch)
        network = self._carry.network
        assert isinstance(network, NVEmbedNetwork)  # no other has a head
        hidden = self._carry.hidden(batch)
        with replaced(network, parts):
            return network.pool(hidden, torch.from_numpy(self._texts.pooled[batch]).to(hidden.device))

    def _rows(self, given: torch.Tensor, batch: int, pooled_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of unmasked tokens [n, in] and their weights [n]; the head's inputs have no others."""
        if given.dim() == 2:
            return given, torch.ones(len(given), device=given.device)
        mask = torch.from_numpy(self._texts.batches[batch][1]).to(given.device)
        if given.shape[:2] != mask.shape:
            raise ValueError(f"{self._segment.name}: a layer's input is {list(given.shape)}, its texts are {list(mask.shape)}")
        counts = mask.float()
        if pooled_only:
            pooled = torch.from_numpy(self._texts.pooled[batch]).to(given.device).float()
            counts = pooled / pooled.sum(dim=1, keepdim=True)
        chosen = counts > 0
        return given[chosen], counts[chosen]


class _AllSeen(Exception):
    """Every layer has its input: the rest of the segment need not run, a block's last and widest product above all."""


def _keeping(caught: dict[str, torch.Tensor], name: str, count: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        caught[name] = given[0]
        if len(caught) == count:
            raise _AllSeen

    return keep


def _grouped(caught: Mapping[str, torch.Tensor]) -> dict[str, list[str]]:
    """Put layers together that were given the same tensor; all of these are alive, so that no two share a place in memory."""
    leaders: dict[Any, str] = {}
    groups: dict[str, list[str]] = {}
    for name, given in caught.items():
        leader = leaders.setdefault((given.data_ptr(), given.shape, given.stride()), name)
        groups.setdefault(leader, []).append(name)
    return groups


class Hessian:
    """The second moment of a layer's inputs, `sum_t c_t x_t x_t^T / sum_t c_t`: half of the Hessian of its squared output error."""

    # Rows are gathered up to this many, so that products are large; columns are multiplied in stretches, upper ones alone.
    ROWS, COLUMNS = 4_096, 2_048

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, device=device)
        self._count = 0.0
        self._rows: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        self._count += float(counts.sum())
        self._rows.append(rows.float() * counts.sqrt()[:, None])
        if sum(map(len, self._rows)) >= self.ROWS:
            self._flush()

    def mean(self) -> torch.Tensor:
        """Return the moment, float32 [width, width]; nothing can be added after that."""
        if self._rows:
            self._flush()
        for start in range(0, len(self._sum), self.COLUMNS):  # below the diagonal, where only whole stretches were multiplied
            stop = start + self.COLUMNS
            inner = self._sum[start:stop, start:stop].triu_()
            inner.add_(inner.triu(1).t())
            self._sum[stop:, start:stop] = self._sum[start:stop, stop:].t()
        return self._sum.div_(self._count)

    def _flush(self) -> None:
        columns = torch.cat(self._rows).t().contiguous()
        self._rows = []
        for start in range(0, len(columns), self.COLUMNS):
            stop = start + self.COLUMNS
            self._sum[start:stop, start:] += linear(columns[start:stop], columns[start:])


class Moments:
    """Of each channel of a layer's inputs the largest magnitude, the mean magnitude and the mean square; and some of the rows."""

    def __init__(self, width: int, device: torch.device, keep: int = 0) -> None:
        """`keep`: how many rows to keep, spread evenly over all that come."""
        self.largest = torch.zeros(width, device=device)
        self._magnitudes, self._squares = (torch.zeros(width, device=device, dtype=torch.float64) for _ in range(2))
        self._count = 0.0
        self._keep, self._stride, self._seen = keep, 1, 0
        self._kept: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        magnitudes = rows.float().abs()
        self.largest = torch.maximum(self.largest, magnitudes.amax(dim=0))
        self._magnitudes += counts @ magnitudes
        self._squares += counts @ magnitudes.square_()
        self._count += float(counts.sum())
        if self._keep:
            self._kept += list(rows[-self._seen % self._stride :: self._stride].float().unbind())
            self._seen += len(rows)
            while len(self._kept) > 2 * self._keep:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    @property
    def mean_magnitude(self) -> torch.Tensor:
        """float32 [width]."""
        return (self._magnitudes / self._count).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """float32 [width]."""
        return (self._squares / self._count).float()

    def rows(self) -> torch.Tensor:
        """Return the kept rows, float32 [at most `keep` or a few more, width]."""
        step = max(1, len(self._kept) // self._keep)
        return torch.stack(self._kept[::step])


def relative_error(made: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the sum over tokens of |made - exact|^2 / |exact|^2, [n, out] twice.

    Relative to each token's own size, because a norm follows sooner or later in which a token with huge values counts no more than
    another. Chosen by the plain sum, SmoothQuant's exponents for MiniLM served those few tokens: static int8 at a mean cosine of
    0.951, relative 0.997.
    """
    return float(((made - exact).square_().sum(dim=1) / exact.square().sum(dim=1).clamp_min(1e-12)).sum())


def scale_inputs(parts: Parts, inputs: Inputs, layers: Sequence[nn.Linear], factor: torch.Tensor) -> torch.Tensor | None:
    """Divide the common input of some layers by a factor and multiply their weights' columns by it, which changes nothing.

    Done where the division can be put into what makes the input: a norm's weight and bias, or the rows of a linear layer. Whether
    it can is found out by doing it and running the segment on a few texts: an input that something else reads too, or that has
    passed an activation function, changes what the segment answers. So no architecture is written down here.

    Args:
        parts: the segment's modules; changed.
        inputs: the texts.
        layers: linear layers of the segment that are given one and the same input.
        factor: float32 [in], positive.

    Returns:
        None where it was done. The factor where it was not, and nothing is changed: the layers' input has then to be divided by it
        while they run, and their columns to be multiplied.
    """
    expected = inputs.sample(parts).float()
    makers: list[Any] = [module for part in parts.values() for module in part.modules() if _may_make(module, layers)]
    for maker in reversed(makers):
        bias = getattr(maker, "bias", None)
        before = [(tensor, tensor.clone()) for tensor in ([maker.weight.data] if bias is None else [maker.weight.data, bias.data])]
        columns = [(layer, layer.weight.data) for layer in layers]
        for tensor, old in before:
            tensor.copy_(old / (factor[:, None] if tensor.dim() == 2 else factor).to(old.dtype))
        # What the maker's dtype has made of the factor, which is what the columns must make up for.
        kept = before[0][1].float() / before[0][0].float()
        kept = torch.where(kept.isfinite(), kept, factor[:, None] if kept.dim() == 2 else factor)
        _scale_columns(columns, kept.mean(dim=1) if kept.dim() == 2 else kept)
        if torch.allclose(inputs.sample(parts).float(), expected, rtol=0, atol=_tolerance(expected, columns[0][1].dtype)):
            return None
        for tensor, old in before:
            tensor.copy_(old)
        for layer, weight in columns:
            layer.weight.data = weight
    return factor


def _scale_columns(columns: Sequence[tuple[nn.Linear, torch.Tensor]], factor: torch.Tensor) -> None:
    """Multiply columns by a factor, in float32; the weights keep their dtype."""
    for layer, weight in columns:
        layer.weight.data = (weight.float() * factor).to(weight.dtype)


def _may_make(module: nn.Module, layers: Sequence[nn.Linear]) -> bool:
    """Whether a module's output could be the input of layers, by its sizes."""
    if any(module is layer for layer in layers):
        return False
    width = layers[0].in_features
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features == width
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)


def _tolerance(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may change."""
    return float(expected.abs().max()) * max(32 * torch.finfo(dtype).eps, 1e-4)


class Magnitudes:
    """How often a layer's inputs have which magnitude, for the range of a static scale."""

    BINS = 4_096

    def __init__(self, largest: float) -> None:
        """`largest`: magnitude where the last bin ends."""
        self.largest = max(largest, 1e-12)
        self._bins = torch.zeros(self.BINS, dtype=torch.float64)

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Take rows [n, width] and what each counts, float32 [n]."""
        magnitudes = rows.float().abs()
        bins = (magnitudes * (self.BINS / self.largest)).long().clamp_max_(self.BINS - 1)
        weights = counts.double()[:, None].expand_as(magnitudes)
        self._bins += torch.bincount(bins.flatten(), weights.flatten(), minlength=self.BINS).cpu()

    def percentile(self, percent: float) -> float:
        """Return the magnitude that `percent` of the values do not exceed."""
        reached = self._bins.cumsum(0) / self._bins.sum()
        place = int(torch.searchsorted(reached, percent / 100))
        return self.largest * min(place + 1, self.BINS) / self.BINS

    def least_error(self, levels: int = 127) -> float:
        """Return the magnitude at which a symmetric grid of so many positive levels should end for the least squared error."""
        middles = (torch.arange(self.BINS, dtype=torch.float64) + 0.5) * (self.largest / self.BINS)
        best, least = self.largest, float("inf")
        for part in np.geomspace(0.02, 1.0, 120):
            end = self.largest * float(part)
            rounded = (middles / (end / levels)).round_().clamp_max_(levels) * (end / levels)
            error = float((self._bins * (rounded - middles) ** 2).sum())
            if error < least:
                best, least = end, error
        return best
