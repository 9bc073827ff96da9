"""Width pruning: attention heads and MLP channels are dropped, and the layers that read them are refitted to their old outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method, StepOverride, check_overrides, overridden, share_of
from compress.models.architectures import block_path, is_in_block
from compress.models.files.headers import TensorInfo
from compress.models.files.variant import BlockSizes
from compress.models.shape import ModelShape, matching, with_backbone

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.architectures import Anatomy
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

# The number of channels is kept a multiple of this, for fast kernels and for groups of weights.
MULTIPLE = 8


@dataclass(frozen=True)
class _Reader:
    """A layer that reads groups of channels, some of which are dropped."""

    name: str
    layer: nn.Linear
    groups: torch.Tensor
    """The layer's inputs of each group, int64 [groups, size]."""
    makers: torch.Tensor
    """Sum of the squared weights that make each group, float32 [groups]."""
    keep: int
    """Number of groups that stay."""


class Shares(StepOverride):
    """Shares that are kept of the blocks that match a pattern, where they differ from the step's own."""

    channels: float | None = Field(None, gt=0, le=1)
    """Share of the MLP channels that is kept; by default the step's own."""
    heads: float | None = Field(None, gt=0, le=1)
    """Share of the attention heads that is kept; by default the step's own."""


@dataclass(frozen=True)
class _Left:
    """What the layers of narrowed blocks keep, by their names."""

    rows: dict[str, int]
    """Number of rows of the layers that make heads and channels."""
    columns: dict[str, int]
    """Number of columns of the layers that read them."""
    attention: set[str]
    """Those of the latter that read heads."""


class Width(Method):
    """Drop a share of the heads, and of the MLP channels, in every block; the model's config then has the smaller numbers.

    Blocks are narrowed one after another, each with the inputs that the narrowed blocks before it make, heads before channels. The
    layer that reads the remaining channels is refitted in closed form: least squares against its outputs with all channels, on the
    calibration tokens. BERT's config cannot give the number of heads apart from their width, and no config gives blocks of
    different widths: such models run only here, and are exported as graphs (onnx, openvino).
    """

    family: ClassVar[str] = "smaller"
    method: Literal["width"] = "width"
    spreads: ClassVar[tuple[str, ...]] = ("channels", "heads", "overrides")
    channels: float = Field(1.0, gt=0, le=1)
    """Share of the MLP channels that is kept, rounded to a multiple of 8."""
    heads: float = Field(1.0, gt=0, le=1)
    """Share of the attention heads that is kept, rounded, halves up; query heads that share keys and values are dropped
    together."""
    criterion: Literal["error", "activation", "magnitude"] = "error"
    """How heads and channels are chosen. `error`: those whose removal adds the least squared error to the layer's outputs after the
    refit (optimal brain surgeon for groups: ZipLM, Kurtic et al. 2023, arXiv 2302.04089). `activation`: those that contribute
    least, E[x^2] |w|^2 (Wanda for single weights; FLAP, An et al. 2023, arXiv 2312.11983, for channels). `magnitude`: those with
    the smallest weights."""
    refit: bool = True
    """Whether the layer that reads the remaining channels is refitted; otherwise its columns are kept as they are."""
    damping: float = Field(0.01, gt=0, le=1)
    """Value added to the diagonal of the inputs' covariance, as a share of the diagonal's mean."""
    overrides: dict[str, Shares] = Field(default={})
    """Other shares for some blocks, by pattern of the blocks' names, such as {"*layers.3": {channels: 0.5}}; the last match
    wins, and a share of 1 keeps everything."""

    @model_validator(mode="after")
    def _drops_something(self) -> Self:
        shares = (self.channels, self.heads, *(share for one in self.overrides.values() for share in (one.channels, one.heads)))
        if all(share in (1, None) for share in shares):
            raise ValueError("keeps everything; give `channels` or `heads`, a share below 1")
        return self

    @field_validator("overrides")
    @classmethod
    def _overrides_say_something(cls, overrides: dict[str, Shares]) -> dict[str, Shares]:
        check_overrides(overrides)
        return overrides

    def shares_of(self, block: str) -> dict[str, float]:
        """Return the shares of `channels` and `heads` that are kept of a block, by its name in the network."""
        return {"channels": self.channels, "heads": self.heads} | overridden(block, self.overrides)

    def spread(self, rounds: int, shape: ModelShape) -> tuple[Self | None, ...]:
        """Return the step of each round: what is left of the first sizes after round r of n is the step's share to the power r/n.

        Each number is rounded as the step alone rounds its own, so that the last round ends at the same sizes.

        Raises:
            ValueError: the step does not fit the model.
        """
        self.estimate(shape)
        first: dict[str, dict[str, int]] = {}
        for path, one in zip(_blocks_of(shape), sizes_of(shape), strict=True):
            found = {"channels": one.channels, "heads": one.key_heads}
            first[path] = {key: count for key, count in found.items() if count is not None}
        before, parts = first, list[Self | None]()
        for number in range(1, rounds + 1):
            after = {path: self._left_after(number / rounds, path, counts) for path, counts in first.items()}
            shares = {path: {key: after[path][key] / count for key, count in counts.items()} for path, counts in before.items()}
            parts.append(self._with(shares))
            before = after
        return tuple(parts)

    def _left_after(self, progress: float, path: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Return what is left of a block's channels and heads (of keys) after a part of the rounds."""
        shares = {key: self.shares_of(path)[key] ** progress for key in counts}
        rounded = {"channels": _channels, "heads": _heads}
        return {key: rounded[key](shares[key], count) if shares[key] < 1 else count for key, count in counts.items()}

    def _with(self, shares: Mapping[str, Mapping[str, float]]) -> Self | None:
        """Return the step with these shares, by block; None if they keep everything."""
        of_key = {key: {own[key] for own in shares.values() if key in own} or {1.0} for key in ("channels", "heads")}
        if all(found == {1.0} for found in of_key.values()):
            return None
        if all(len(found) == 1 for found in of_key.values()):
            return self.model_copy(update={**{key: found.pop() for key, found in of_key.items()}, "overrides": {}})
        overrides = {path: Shares(**own) for path, own in shares.items()}
        return self.model_copy(update={"channels": 1.0, "heads": 1.0, "overrides": overrides})

    @property
    def calibrates(self) -> bool:
        """Whether the choice or the refit needs the inputs."""
        return self.refit or self.criterion != "magnitude"

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Put the new sizes into the config, or into the variant if the config has no key for them."""
        before = model.shape
        after, anatomy = self.estimate(before).after, before.anatomy
        resized = {name: info for name, info in after.tensors.items() if info.shape != before.tensors[name].shape}
        sizes = sizes_of(after)
        counts, heads = {one.heads for one in sizes if one.heads is not None}, model.heads
        if len(counts) > 1:
            heads = None
        elif any(name.endswith(f".{anatomy.output}.weight") for name in resized) and not anatomy.heads_in_config:
            heads = counts.pop()
        made = replace(model, config=after.config, heads=heads, blocks=uneven(sizes))
        return self, replace(made, resized={**model.resized, **resized})

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Narrow a block: heads first, so that the MLP's inputs are those that the narrowed attention makes.

        Raises:
            ValueError: a second moment has no Cholesky factor.
        """
        for path, block in parts.items():
            if is_in_block(path) and self.shares_of(path)["heads"] < 1:
                self._narrow_attention(path, block, parts, inputs)
            if is_in_block(path) and self.shares_of(path)["channels"] < 1:
                self._narrow_mlp(path, block, parts, inputs)
        return {}

    def _narrow_attention(self, path: str, block: nn.Module, parts: Parts, inputs: Inputs | None) -> None:
        """Drop heads, or groups of query heads with their common keys and values, if the block has its attention."""
        import torch

        from compress.models.network.surgery import block_anatomy, count_heads, head_width, take

        anatomy = block_anatomy(block)
        layers: Mapping[str, nn.Linear] = dict(block.named_modules())  # type: ignore[assignment]
        if f"{anatomy.output}.weight" not in block.state_dict():
            return
        width = head_width(block, anatomy)
        query, key, value = (layers[name] for name in anatomy.attention)
        keys = key.out_features // width
        shared = query.out_features // key.out_features  # query heads that share keys and values
        groups = torch.arange(query.out_features).view(keys, shared * width)
        makers = value.weight.data.float().view(keys, -1).square().sum(dim=1)
        keep = _heads(self.shares_of(path)["heads"], keys)
        reader = _Reader(f"{path}.{anatomy.output}", layers[anatomy.output], groups, makers, keep)
        left = self._choose_and_refit(reader, parts, inputs)
        take(query, rows=groups[left].flatten())
        for layer in (key, value):
            take(layer, rows=torch.arange(layer.out_features).view(keys, width)[left].flatten())
        count_heads(block, anatomy, len(left) * shared, len(left))

    def _narrow_mlp(self, path: str, block: nn.Module, parts: Parts, inputs: Inputs | None) -> None:
        """Drop MLP channels, if the block has its MLP."""
        import torch

        from compress.models.network.surgery import block_anatomy, take

        anatomy = block_anatomy(block)
        layers: Mapping[str, nn.Linear] = dict(block.named_modules())  # type: ignore[assignment]
        if f"{anatomy.down}.weight" not in block.state_dict():
            return
        falling = layers[anatomy.down]
        channels = falling.in_features
        rising = [layers[name] for name in anatomy.up]
        makers = sum(
            (layer.weight.data.float().view(anatomy.halves, channels, -1).square().sum(dim=(0, 2)) for layer in rising),
            torch.zeros(channels, device=falling.weight.device),
        )
        groups = torch.arange(channels)[:, None]
        reader = _Reader(f"{path}.{anatomy.down}", falling, groups, makers, _channels(self.shares_of(path)["channels"], channels))
        left = self._choose_and_refit(reader, parts, inputs)
        for layer in rising:
            take(layer, rows=torch.cat([left + half * channels for half in range(anatomy.halves)]))

    def _choose_and_refit(self, reader: _Reader, parts: Parts, inputs: Inputs | None) -> torch.Tensor:
        """Choose groups of a layer's inputs, and leave it only these, refitted.

        Returns:
            The groups that stay, int64 [keep], ascending.

        Raises:
            ValueError: a weight is NaN or infinite, or the inputs' covariance has no Cholesky factor.
        """
        import torch

        from compress.methods.prune.groups import Spread, by_error, damped, highest, refitted
        from compress.models.network.surgery import take

        layer, keep = reader.layer, reader.keep
        weight, groups = layer.weight.data.float(), reader.groups.to(layer.weight.device)
        if keep == len(groups):
            return torch.arange(keep, device=groups.device)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{reader.name}.weight holds NaN or infinity")
        squares = weight.square().sum(dim=0)
        magnitudes = squares[groups].sum(dim=1) + reader.makers
        if not self.calibrates:
            left = highest(magnitudes, keep)
            take(layer, columns=groups[left].flatten())
            return left
        # The inputs' mean m and covariance C; without a bias to refit, their second moment.
        assert inputs is not None, "width calibrates"
        _, found = inputs.gather(parts, {reader.name: layer}, Spread)
        mean, spread = found[reader.name].about(mean=self.refit and layer.bias is not None)
        covariance = damped(spread, self.damping)
        # Choose: by the error that is left after the refit (ZipLM), by E[x^2] |w|^2 (Wanda; by the variance, as in FLAP, where the
        # bias # takes up the mean), or by size.
        if self.criterion == "error":
            left = by_error(weight, covariance, groups, keep)
        elif self.criterion == "activation":
            left = highest((squares * spread.diagonal())[groups].sum(dim=1), keep)
        else:
            left = highest(magnitudes, keep)
        # Refit by least squares: W_S' = W_S + W_D C_DS C_SS^-1, and b' = b + W m - W_S' m_S.
        kept = groups[left].flatten()
        made = refitted(weight, covariance, spread, kept) if self.refit else weight[:, kept]
        if self.refit and layer.bias is not None:
            layer.bias.data += (weight @ mean - made @ mean[kept]).to(layer.bias.dtype)
        take(layer, columns=kept)
        layer.weight.data = made.to(layer.weight.dtype)
        return left

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: fewer rows of the layers that make heads and channels, fewer columns of those that read them.

        Raises:
            ValueError: nothing would be left, the blocks' layout is not known, one layer makes queries, keys and values together,
                heads depend on what blocks share, or layers are quantized already.
        """
        anatomy = shape.anatomy
        left = self._left_of(shape, anatomy)
        tensors = dict(shape.as_stored().tensors)
        widest = 0
        for name, info in tensors.items():
            layer, _, kind = name.rpartition(".")
            if layer in left.rows:
                tensors[name] = TensorInfo(info.dtype, (left.rows[layer], *info.shape[1:]))
            elif layer in left.columns and kind == "weight":
                widest = max(widest, info.shape[1])
                tensors[name] = TensorInfo(info.dtype, (info.shape[0], left.columns[layer]))
        if tensors == shape.as_stored().tensors:
            raise ValueError(f"{shape.name} keeps all of its heads and channels at these shares; lower them, or leave the step out")
        sizes = sizes_of(replace(shape, tensors=tensors))
        channels = sorted({one.channels for one in sizes if one.channels is not None})
        heads = sorted({(one.heads, one.key_heads or one.heads) for one in sizes if one.heads is not None})
        # A config has one number for all blocks; what differs from block to block is in the variant: see `prepare`.
        changes, kept = dict[str, int](), list[str]()
        if left.columns.keys() - left.attention:
            kept.append(f"{_from_to(channels)} channels")
            if len(channels) == 1:
                changes[anatomy.channels_key] = channels[0]
        if left.attention:
            kept.append(f"{_from_to([count for count, _ in heads])} heads")
            if len(heads) == 1 and anatomy.heads_in_config:
                changes |= {"num_attention_heads": heads[0][0], "num_key_value_heads": heads[0][1], "head_dim": shape.head_width}
        after = replace(shape, tensors=tensors, config=with_backbone(shape.config, **changes))
        return Estimate(
            after=after,
            memory_bytes=4 * 8 * widest**2 if self.calibrates else 0,
            bytes_touched=0,
            flops=2.0 * shape.blocks * widest**3 if self.calibrates else 0.0,
            note=f"{' and '.join(kept)} kept in each block, {(shape.parameters - after.parameters) / 1e6:,.1f} M fewer parameters"
            + (", the layers that read them refitted" if self.refit else ""),
        )

    def _left_of(self, shape: ModelShape, anatomy: Anatomy) -> _Left:
        """Return what the layers of the blocks that are narrowed keep."""
        blocks = _blocks_of(shape)
        for pattern in self.overrides:
            if not matching(blocks, [pattern]):
                raise ValueError(f"overrides {pattern!r} matches none of the model's {len(blocks)} blocks, such as {min(blocks)!r}")
        left = _Left({}, {}, set())
        for path, layers in blocks.items():
            shares = self.shares_of(path)
            for layer in (anatomy.output, anatomy.down):
                if f"{layer}.weight_scale" in layers:
                    raise ValueError(f"{shape.name}: {layer} is quantized by an earlier step; put width before it")
            if shares["channels"] < 1 and f"{anatomy.down}.weight" in layers:
                channels = _channels(shares["channels"], layers[f"{anatomy.down}.weight"].shape[1])
                left.columns[f"{path}.{anatomy.down}"] = channels
                left.rows.update({f"{path}.{layer}": anatomy.halves * channels for layer in anatomy.up})
            if shares["heads"] < 1 and f"{anatomy.output}.weight" in layers:
                _check_heads(shape, anatomy)
                width = shape.head_width
                counts = [layers[f"{layer}.weight"].shape[0] // width for layer in anatomy.attention]
                keys = _heads(shares["heads"], counts[1])
                rows = [keys * count // counts[1] * width for count in counts]
                made = {f"{path}.{layer}": count for layer, count in zip(anatomy.attention, rows, strict=True)}
                left.rows.update(made)
                left.attention.add(f"{path}.{anatomy.output}")
                left.columns[f"{path}.{anatomy.output}"] = rows[0]
        return left


def _check_heads(shape: ModelShape, anatomy: Anatomy) -> None:
    """See that heads can be dropped.

    Raises:
        ValueError: they cannot.
    """
    if "heads" in anatomy.refused:
        raise ValueError(f"{shape.name}: heads cannot be dropped, because {anatomy.refused['heads']}; leave `heads` out")
    if len(anatomy.attention) == 1:
        raise ValueError(f"{shape.name}: {anatomy.attention[0]} makes queries, keys and values in one; leave `heads` out")


def _blocks_of(shape: ModelShape) -> dict[str, dict[str, TensorInfo]]:
    """Return the tensors of each block, by their names in it, by the block's name."""
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in shape.tensors.items():
        path = block_path(name)
        if path is not None:
            found.setdefault(path, {})[name.removeprefix(f"{path}.")] = info
    return found


def sizes_of(shape: ModelShape) -> list[BlockSizes]:
    """Return the numbers of channels and heads of every block; None for those of a sublayer that it lacks.

    Heads of one layer that makes queries, keys and values together are not counted.
    """
    anatomy, found = shape.anatomy, []
    for path, layers in _blocks_of(shape).items():
        sizes = {"block": int(path.rpartition(".")[2])}
        if f"{anatomy.down}.weight" in layers:
            sizes["channels"] = layers[f"{anatomy.down}.weight"].shape[1]
        if f"{anatomy.output}.weight" in layers and len(anatomy.attention) > 1:
            query, key = (layers[f"{layer}.weight"].shape[0] // shape.head_width for layer in anatomy.attention[:2])
            sizes |= {"heads": query, "key_heads": key}
        found.append(BlockSizes(**sizes))
    return found


def uneven(sizes: Sequence[BlockSizes]) -> tuple[BlockSizes, ...]:
    """Return what has to be said of single blocks, because one number for all of them would be wrong."""
    channels = len({one.channels for one in sizes if one.channels is not None}) > 1
    heads = len({(one.heads, one.key_heads) for one in sizes if one.heads is not None}) > 1
    unsaid = ({} if channels else {"channels": None}) | ({} if heads else {"heads": None, "key_heads": None})
    return tuple(one.model_copy(update=unsaid) for one in sizes) if channels or heads else ()


def _from_to(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if len(counts) == 1 else f"{min(counts)} to {max(counts)}"


def _channels(share: float, channels: int) -> int:
    """Return the number of channels that stay."""
    return min(channels, max(1, share_of(share / MULTIPLE, channels)) * MULTIPLE)


def _heads(share: float, groups: int) -> int:
    """Return the number of heads, or of groups of heads with common keys and values, that stay.

    Raises:
        ValueError: none would.
    """
    left = share_of(share, groups)
    if left == 0:
        raise ValueError(f"`heads: {share}` leaves none of {groups} heads (counted where keys and values are made)")
    return left
