"""From hidden states to vectors, in one place for every network: pooling, then normalisation.

Embedders, streamed walks, calibration, training and graphs all run a network's `text_head`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import nn

from compress.common.errors import UserError
from compress.models.text.spec import EmbedderSpec, HeadModule, Pooling, WeightedLayers


@dataclass(frozen=True)
class PackedRows:
    """Which rows of a packed batch belong to which text, and which of them are pooled. A text's rows follow each other."""

    text: torch.Tensor
    """Number of the text that each row belongs to, int64 [rows]."""
    positions: torch.Tensor
    """Position of each row in its text, from 0, int64 [rows]."""
    offsets: torch.Tensor
    """Row at which each text begins, and the number of rows at the end, int32 [texts + 1]. Every text has a row."""
    first: torch.Tensor
    """First pooled row of each text, int64 [texts]."""
    stop: torch.Tensor
    """Row after the last pooled one of each text, int64 [texts]; at most `first` where no row is pooled."""

    @property
    def any_pooled(self) -> torch.Tensor:
        """Whether a text has a pooled row, bool [texts, 1]."""
        return (self.stop > self.first).unsqueeze(1)

    @property
    def pooled(self) -> torch.Tensor:
        """Whether a row is pooled, bool [rows]."""
        row = torch.arange(len(self.text), device=self.text.device)
        return (row >= self.first[self.text]) & (row < self.stop[self.text])

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Add up the rows of each text: float32 [rows, width] to [texts, width], in the same order on every call."""
        return self._reduced(values, "sum")

    def highest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the largest values over the rows of each text: float32 [rows, width] to [texts, width]."""
        return self._reduced(values, "max")

    def _reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        # `unsafe` leaves out a check of the offsets that would wait for the device.
        made: torch.Tensor = torch.segment_reduce(values, how, offsets=self.offsets.long(), axis=0, unsafe=True)
        return made


class TokenPooling(nn.Module):
    """Pooling without weights, as sentence-transformers' `Pooling` does it; the results of several modes are concatenated.

    Prompts that are not pooled are left out by every mode: the first token is then the first one after the prompt.
    """

    def __init__(self, modes: Sequence[Pooling]) -> None:
        super().__init__()
        self.modes = tuple(modes)

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Pool hidden states; see `TextHead.forward`. A text without any pooled token becomes a zero vector."""
        made = [POOLINGS[mode].padded(hidden, pooled) for mode in self.modes]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)

    def packed(self, hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Pool the hidden states of a packed batch; see `TextHead.packed`."""
        made = [POOLINGS[mode].packed(hidden, rows) for mode in self.modes]
        return made[0] if len(made) == 1 else torch.cat(made, dim=1)


def _chosen(hidden: torch.Tensor, pooled: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return the pooled token that is greatest in an order, int64 [length]."""
    place = (pooled * order).argmax(dim=1)
    # Gathered, because an index over the texts would tie a traced graph to their number.
    rows = hidden.gather(1, place.view(-1, 1, 1).expand(-1, 1, hidden.shape[2])).squeeze(1).float()
    return torch.where(pooled.any(dim=1, keepdim=True), rows, 0.0)


def _first(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return _chosen(hidden, pooled, torch.arange(pooled.shape[1], 0, -1, device=pooled.device))


def _last(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    return _chosen(hidden, pooled, torch.arange(1, pooled.shape[1] + 1, device=pooled.device))


def _weighted_sum(hidden: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    # A product of [1, length] with [length, width]: no masked copy of the hidden states.
    return (weights.unsqueeze(1) @ hidden.float()).squeeze(1)


def _mean(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    weights = pooled.to(torch.float32)
    return _weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)


def _mean_sqrt(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    weights = pooled.to(torch.float32)
    return _weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9).sqrt()


def _weighted_mean(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    # Tokens count by their position in the text, from 1, the prompt's included (Muennighoff 2022, SGPT).
    weights = pooled.to(torch.float32) * torch.arange(1, pooled.shape[1] + 1, device=pooled.device)
    return _weighted_sum(hidden, weights) / weights.sum(dim=1, keepdim=True).clamp_min(1e-9)


def _max(hidden: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    highest = hidden.float().masked_fill(pooled.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
    return torch.where(pooled.any(dim=1, keepdim=True), highest, 0.0)


def _row_of(hidden: torch.Tensor, rows: PackedRows, place: torch.Tensor) -> torch.Tensor:
    """Return one row of each text, zeros where none is pooled; place: int64 [texts]."""
    return torch.where(rows.any_pooled, hidden[place.clamp(0, len(hidden) - 1)].float(), 0.0)


def _first_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    return _row_of(hidden, rows, rows.first)


def _last_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    return _row_of(hidden, rows, rows.stop - 1)


def _sums_packed(hidden: torch.Tensor, rows: PackedRows, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted sums [texts, width] and the sums of the weights [texts, 1]; weights: float32 [rows]."""
    total = rows.sums(weights.unsqueeze(1)).clamp_min(1e-9)
    return rows.sums(hidden.float() * weights.unsqueeze(1)), total


def _mean_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    sums, total = _sums_packed(hidden, rows, rows.pooled.float())
    return sums / total


def _mean_sqrt_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    sums, total = _sums_packed(hidden, rows, rows.pooled.float())
    return sums / total.sqrt()


def _weighted_mean_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    sums, total = _sums_packed(hidden, rows, rows.pooled * (rows.positions + 1).float())
    return sums / total


def _max_packed(hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
    highest = rows.highest(hidden.float().masked_fill(~rows.pooled.unsqueeze(1), float("-inf")))
    return torch.where(rows.any_pooled, highest, 0.0)


@dataclass(frozen=True)
class PoolingRule:
    """A pooling without weights, for both forms of a batch."""

    padded: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """From hidden states [texts, length, width] and the pooled tokens, int64 [texts, length], to float32 [texts, width]."""
    packed: Callable[[torch.Tensor, PackedRows], torch.Tensor]
    """From hidden states [rows, width] of texts end to end to float32 [texts, width]."""


POOLINGS = {
    Pooling.CLS: PoolingRule(_first, _first_packed),
    Pooling.LAST: PoolingRule(_last, _last_packed),
    Pooling.MEAN: PoolingRule(_mean, _mean_packed),
    Pooling.MEAN_SQRT: PoolingRule(_mean_sqrt, _mean_sqrt_packed),
    Pooling.WEIGHTED: PoolingRule(_weighted_mean, _weighted_mean_packed),
    Pooling.MAX: PoolingRule(_max, _max_packed),
}
"""By mode. A text of which nothing is pooled becomes zeros."""


class Dense(nn.Module):
    """sentence-transformers' `Dense`: a linear layer with an activation function, in float32 whatever the network computes in."""

    def __init__(self, described: HeadModule) -> None:
        super().__init__()
        assert described.inputs is not None
        assert described.width is not None
        self.linear = Float32Linear(described.inputs, described.width, described.bias)
        self.activation = getattr(nn, described.activation.rpartition(".")[2])()
        self.adds_input = described.residual
        if described.residual and described.inputs != described.width:
            self.residual = Float32Linear(described.inputs, described.width, False)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map vectors, float32 [texts, inputs] to [texts, width]."""
        made: torch.Tensor = self.activation(self.linear(vectors))
        if not self.adds_input:
            return made
        return made + (self.residual(vectors) if hasattr(self, "residual") else vectors)


class Float32Linear(nn.Linear):
    """A linear layer whose weights keep their stored precision and are multiplied in float32."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Map float32 [..., inputs] to [..., outputs]."""
        return nn.functional.linear(vectors, self.weight.float(), None if self.bias is None else self.bias.float())


class Float32Norm(nn.LayerNorm):
    """A layer norm in float32 whatever precision its weights are stored in."""

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalise float32 [..., width]."""
        return nn.functional.layer_norm(vectors, self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LayerNorm(nn.Module):
    """sentence-transformers' `LayerNorm`."""

    def __init__(self, described: HeadModule) -> None:
        super().__init__()
        assert described.width is not None
        self.norm = Float32Norm(described.width)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Normalise vectors, float32 [texts, width]."""
        normalised: torch.Tensor = self.norm(vectors)
        return normalised


class Normalize(nn.Module):
    """Scales vectors to unit length."""

    def __init__(self, described: HeadModule) -> None:
        super().__init__()

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """Scale vectors, float32 [texts, width]."""
        return nn.functional.normalize(vectors, dim=1)


class LayerMean(nn.Module):
    """sentence-transformers' `WeightedLayerPooling`: the weighted mean of hidden states from one block on, in float32.

    State 0 enters the first block, state n leaves block n (from 1); the last one has passed the final norm too.
    """

    def __init__(self, described: WeightedLayers) -> None:
        super().__init__()
        self.start, self.blocks = described.start, described.blocks
        self.layer_weights = nn.Parameter(torch.ones(described.blocks + 1 - described.start))

    def add(self, total: torch.Tensor | None, number: int, hidden: torch.Tensor) -> torch.Tensor | None:
        """Add one state to the weighted sum of those before it: [texts, length, width]; None while none counts."""
        if number < self.start:
            return total
        weighted = self.layer_weights[number - self.start].float() * hidden.float()
        return weighted if total is None else total + weighted

    def mean(self, total: torch.Tensor) -> torch.Tensor:
        """Return the mean, float32 [texts, length, width], given the weighted sum of all states."""
        return total / self.layer_weights.float().sum()

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Average states, each [texts, length, width], to float32 [texts, length, width]."""
        total: torch.Tensor | None = None
        for number, hidden in enumerate(states):
            total = self.add(total, number, hidden)
        assert total is not None
        return self.mean(total)


HEAD_MODULES = {"Dense": Dense, "LayerNorm": LayerNorm, "Normalize": Normalize}
"""What may come between pooling and the final vector, by its kind in the spec. Tensors have the names of the module's own file."""


class TextHead(nn.Module):
    """The part of a network that turns hidden states into vectors."""

    layers: LayerMean | None
    """What makes one tensor of hidden states of those of several blocks, before pooling; None: the last block's are pooled."""
    unrotate: nn.Module | None
    """What multiplies the hidden states of a rotated network before pooling; None: they are pooled as they come."""

    def __init__(
        self,
        pooling: nn.Module,
        modules: Sequence[nn.Module] = (),
        *,
        normalize: bool,
        dimensions: int | None = None,
        layers: LayerMean | None = None,
        unrotate: nn.Module | None = None,
    ) -> None:
        """Take what vectors go through.

        Args:
            pooling: a `TokenPooling`, or a module that is called like one.
            modules: come after it, in order.
            normalize: whether vectors are then scaled to unit length.
            dimensions: how many leading dimensions are kept in the end; None: all.
            layers: what averages the blocks' outputs, if the last block's alone are not pooled.
            unrotate: what multiplies hidden states before they are pooled, [..., width] to [..., width].
        """
        super().__init__()
        self.layers = layers
        self.unrotate = unrotate
        self.pooling = pooling
        self.after = nn.ModuleList(modules)
        self.normalize = normalize
        self.dimensions = dimensions

    def forward(self, hidden: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False) -> torch.Tensor:
        """Turn hidden states into vectors.

        Args:
            hidden: [texts, length, width], any floating dtype, as `hidden_of` gives them: after the final norm, or averaged by
                `layers`.
            tokens: int64 [texts, length], 1 for tokens, 0 for padding on the right.
            pooled: int64 [texts, length], 1 for tokens that are pooled: all of them, or those after a prompt.
            traced: whether a graph is made of it, in which no shape may depend on the masks.

        Returns:
            float32 [texts, dimension], differentiable.
        """
        vectors: torch.Tensor = self.pooling(self._unrotated(hidden), tokens, pooled, traced=traced)
        return self._finished(vectors)

    def packed(self, hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Turn the hidden states of a packed batch into vectors; equals `forward` on the same texts padded, up to rounding.

        Args:
            hidden: [rows, width], any floating dtype, as `forward` takes them, without padding.
            rows: which rows are whose.

        Returns:
            float32 [texts, dimension]. Nothing in it waits for the device.
        """
        pooling = cast(PackedPooling, self.pooling)
        return self._finished(pooling.packed(self._unrotated(hidden), rows))

    def _unrotated(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.unrotate is None else self.unrotate(hidden)

    def _finished(self, vectors: torch.Tensor) -> torch.Tensor:
        """Run what comes after pooling, float32 [texts, width] to [texts, dimension]."""
        for module in self.after:
            vectors = module(vectors)
        if self.normalize:
            vectors = nn.functional.normalize(vectors, dim=1)
        return vectors if self.dimensions is None else vectors[:, : self.dimensions]


class PackedPooling(Protocol):
    """A pooling as packed batches are put through it; both poolings of this project are."""

    def packed(self, hidden: torch.Tensor, rows: PackedRows) -> torch.Tensor:
        """Pool hidden states [rows, width] to float32 [texts, width]."""
        ...


class TextNetwork(Protocol):
    """A network with a head that makes vectors, as `compress.models.network.build` returns it."""

    text_head: TextHead
    """The head."""


def attach_head(network: nn.Module, spec: EmbedderSpec) -> nn.Module:
    """Give a network the head that a spec describes, and return the network; one with a pooling of its own keeps that.

    Raises:
        UserError: the head averages the outputs of another number of blocks than the network has.
    """
    if hasattr(network, "finish_with"):
        network.finish_with(spec)  # type: ignore[operator]
        return network
    modules = [HEAD_MODULES[described.kind](described) for described in spec.modules]
    layers = None if spec.layers is None else LayerMean(spec.layers)
    if layers is not None:
        blocks = int(backbone_of(network).config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
        if layers.blocks != blocks:
            raise UserError(f"WeightedLayerPooling: num_hidden_layers is {layers.blocks}, and the network has {blocks} blocks")
    network.text_head = TextHead(
        TokenPooling(spec.poolings),
        modules,
        normalize=spec.normalize,
        dimensions=spec.dimensions,
        layers=layers,
        unrotate=unrotation(network) if spec.rotated else None,
    ).eval()
    return network


def unrotation(network: nn.Module) -> nn.Linear:
    """Return the layer, without values of its own, that multiplies the hidden states of a rotated network before pooling."""
    width = int(backbone_of(network).config.hidden_size)  # type: ignore[union-attr, arg-type]
    return nn.Linear(width, width, bias=False)


def head_of(network: nn.Module) -> TextHead:
    """Return a network's head."""
    return cast(TextNetwork, network).text_head


def backbone_of(network: nn.Module) -> nn.Module:
    """Return the module that computes hidden states from token ids: the network's `backbone`, or a transformers network itself."""
    return getattr(network, "backbone", network)


def hidden_of(network: nn.Module, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return what a network's head is given, [texts, length, width]; ids and tokens: int64 [texts, length]."""
    backbone, layers = backbone_of(network), head_of(network).layers
    if layers is None:
        hidden: torch.Tensor = backbone(input_ids=ids, attention_mask=tokens).last_hidden_state
        return hidden
    averaged: torch.Tensor = layers(backbone(input_ids=ids, attention_mask=tokens, output_hidden_states=True).hidden_states)
    return averaged


def vectors_of(
    network: nn.Module, ids: torch.Tensor, tokens: torch.Tensor, pooled: torch.Tensor, *, traced: bool = False
) -> torch.Tensor:
    """Embed a padded batch.

    Args:
        network: a network with a `text_head`.
        ids: int64 [texts, length].
        tokens: see `TextHead.forward`.
        pooled: see `TextHead.forward`.
        traced: see `TextHead.forward`.

    Returns:
        float32 [texts, dimension].
    """
    hidden = hidden_of(network, ids, tokens)
    vectors: torch.Tensor = head_of(network)(hidden, tokens, pooled, traced=traced)
    return vectors


class TracedNetwork(nn.Module):
    """A network from token ids to vectors, in the form that is traced for a graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pool_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Embed a batch: int64 [texts, length] to float32 [texts, dimension]. Without `pool_mask` all tokens are pooled."""
        return vectors_of(self.network, input_ids, attention_mask, attention_mask if pool_mask is None else pool_mask, traced=True)
