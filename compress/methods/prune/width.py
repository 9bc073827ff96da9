"""Width: attention heads and MLP channels dropped, and the layers that read them refitted to what they gave before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method, share_of
from compress.models.architectures import is_in_block, place_in_block
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape, with_backbone

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.architectures import Anatomy
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

# What kernels and groups of weights like the number of channels to be a multiple of.
MULTIPLE = 8


class Width(Method):
    """Drop the same share of heads, and of MLP channels, in every block; the architecture's config says how many are left.

    Block by block, with the inputs that the narrowed blocks before make, heads before channels. The layer that reads the survivors
    is refitted in closed form: least squares against what it gave with all of them, on the calibration texts' tokens. BERT's own
    config cannot say how many heads there are beside how wide they are; without some of its heads it runs here alone.
    """

    method: Literal["width"] = "width"
    channels: float = Field(1.0, gt=0, le=1)
    """Share of the MLP channels that is kept, rounded to a multiple of 8."""
    heads: float = Field(1.0, gt=0, le=1)
    """Share of the attention heads that is kept, rounded, halves up; where query heads share keys and values, whole groups go."""
    criterion: Literal["error", "activation", "magnitude"] = "error"
    """What goes. `error`: what costs least squared error of the block's outputs once the others are refitted (optimal brain surgeon
    for groups: Kurtic et al. 2023, ZipLM, arXiv 2302.04089). `activation`: what the reading layer makes least of, E[x^2] |w|^2 (Sun
    et al. 2023 for single weights, An et al. 2023, FLAP, arXiv 2312.11983, for channels). `magnitude`: the smallest weights."""
    refit: bool = True
    """Whether the reading layer is refitted. False: its columns are taken as they are."""
    damping: float = Field(0.01, gt=0, le=1)
    """Added to the diagonal of the second moments, as a share of its mean."""

    @model_validator(mode="after")
    def _drops_something(self) -> Self:
        if self.channels == self.heads == 1:
            raise ValueError("keeps everything; give `channels` or `heads`, a share below 1")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the inputs decide anything."""
        return self.refit or self.criterion != "magnitude"

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Say in the config what will be left of each block, or beside it where it has no room for that."""
        shape = model.shape
        after, anatomy = self.estimate(shape).after, shape.anatomy
        heads = model.heads
        if self.heads < 1 and not anatomy.heads_in_config:
            heads = self._left_of(shape, anatomy)[1][anatomy.output] // shape.head_width
        return self, replace(model, config=after.config, heads=heads)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Narrow a block.

        Raises:
            ValueError: a second moment has no Cholesky factor.
        """
        for path, block in parts.items():
            if is_in_block(path):
                _narrow(self, path, block, parts, inputs)
        return {}

    def estimate(self, shape: ModelShape) -> Estimate:
        """Size after: fewer rows of the layers that make heads and channels, fewer columns of those that read them.

        Raises:
            ValueError: nothing would be left, the blocks' layout is not known, one layer makes queries, keys and values, or layers
                are quantized already.
        """
        anatomy = shape.anatomy
        rows, columns = self._left_of(shape, anatomy)
        tensors = dict(shape.as_stored().tensors)
        widest = 0
        for name, info in tensors.items():
            at = place_in_block(name)
            layer, _, kind = ("", "", "") if at is None else at[1].rpartition(".")
            if layer in rows:
                tensors[name] = TensorInfo(info.dtype, (rows[layer], *info.shape[1:]))
            elif layer in columns and kind == "weight":
                widest = max(widest, info.shape[1])
                tensors[name] = TensorInfo(info.dtype, (info.shape[0], columns[layer]))
        changes = {}
        if anatomy.down in columns:
            changes["intermediate_size"] = columns[anatomy.down]
        if anatomy.output in columns and anatomy.heads_in_config:
            queries, keys = (rows[anatomy.attention[index]] // shape.head_width for index in (0, 1))
            changes |= {"num_attention_heads": queries, "num_key_value_heads": keys, "head_dim": shape.head_width}
        after = replace(shape, tensors=tensors, config=with_backbone(shape.config, **changes))
        kept = [f"{columns[anatomy.down]} channels"] if anatomy.down in columns else []
        kept += [f"{columns[anatomy.output] // shape.head_width} heads"] if anatomy.output in columns else []
        return Estimate(
            after=after,
            memory_bytes=4 * 8 * widest**2 if self.calibrates else 0,
            bytes_touched=0,
            flops=2.0 * shape.blocks * widest**3 if self.calibrates else 0.0,
            note=f"{' and '.join(kept)} left in each block, {(shape.parameters - after.parameters) / 1e6:,.1f} M parameters fewer"
            + (", the layers that read them refitted" if self.refit else ""),
        )

    def _left_of(self, shape: ModelShape, anatomy: Anatomy) -> tuple[dict[str, int], dict[str, int]]:
        """Return how many rows and how many columns layers of a block keep, by name."""
        sizes: dict[str, tuple[int, ...]] = {}
        for name, info in shape.tensors.items():
            at = place_in_block(name)
            if at is not None:
                sizes[at[1]] = info.shape
        for layer in (anatomy.output, anatomy.down):
            if f"{layer}.weight_scale" in sizes:
                raise ValueError(f"{shape.name}: {layer} is quantized by a step before; put width before it")
        rows: dict[str, int] = {}
        columns: dict[str, int] = {}
        if self.channels < 1:
            columns[anatomy.down] = self._channels(sizes[f"{anatomy.down}.weight"][1])
            rows |= dict.fromkeys(anatomy.up, anatomy.halves * columns[anatomy.down])
        if self.heads < 1:
            if len(anatomy.attention) == 1:
                raise ValueError(f"{shape.name}: {anatomy.attention[0]} makes queries, keys and values in one; leave `heads` out")
            width = shape.head_width
            before = {layer: sizes[f"{layer}.weight"][0] // width for layer in anatomy.attention}
            keys = before[anatomy.attention[1]]
            rows |= {layer: self._heads(keys) * count // keys * width for layer, count in before.items()}
            columns[anatomy.output] = rows[anatomy.attention[0]]
        return rows, columns

    def _channels(self, channels: int) -> int:
        """Return how many channels stay."""
        return min(channels, max(1, share_of(self.channels / MULTIPLE, channels)) * MULTIPLE)

    def _heads(self, groups: int) -> int:
        """Return how many heads, or groups of heads with common keys and values, stay.

        Raises:
            ValueError: none would.
        """
        left = share_of(self.heads, groups)
        if left == 0:
            raise ValueError(f"`heads: {self.heads}` leaves none of {groups} heads (counted where keys and values are made)")
        return left


def _narrow(step: Width, path: str, block: nn.Module, parts: Parts, inputs: Inputs | None) -> None:
    """Narrow a block, heads first."""
    import torch

    from compress.models.network.surgery import block_anatomy, count_heads, head_width, take

    anatomy, state = block_anatomy(block), block.state_dict()
    layers: Mapping[str, nn.Linear] = dict(block.named_modules())  # type: ignore[assignment]
    if step.heads < 1 and f"{anatomy.output}.weight" in state:
        width = head_width(block, anatomy)
        query, key, value = (layers[name] for name in anatomy.attention)
        keys = key.out_features // width
        shared = query.out_features // key.out_features  # query heads that share keys and values
        groups = torch.arange(query.out_features).view(keys, shared * width)
        makers = value.weight.data.float().view(keys, -1).square().sum(dim=1)
        left = _choose_and_refit(
            step, f"{path}.{anatomy.output}", layers[anatomy.output], groups, makers, step._heads(keys), parts, inputs
        )
        take(query, rows=groups[left].flatten())
        for layer in (key, value):
            take(layer, rows=torch.arange(layer.out_features).view(keys, width)[left].flatten())
        count_heads(block, anatomy, len(left) * shared, len(left))
    if step.channels < 1 and f"{anatomy.down}.weight" in state:
        falling = layers[anatomy.down]
        channels = falling.in_features
        rising = [layers[name] for name in anatomy.up]
        makers = sum(
            (layer.weight.data.float().view(anatomy.halves, channels, -1).square().sum(dim=(0, 2)) for layer in rising),
            torch.zeros(channels, device=falling.weight.device),
        )
        groups = torch.arange(channels)[:, None]
        left = _choose_and_refit(step, f"{path}.{anatomy.down}", falling, groups, makers, step._channels(channels), parts, inputs)
        for layer in rising:
            take(layer, rows=torch.cat([left + half * channels for half in range(anatomy.halves)]))


def _choose_and_refit(
    step: Width,
    name: str,
    reader: nn.Linear,
    groups: torch.Tensor,
    makers: torch.Tensor,
    keep: int,
    parts: Parts,
    inputs: Inputs | None,
) -> torch.Tensor:
    """Choose groups of a layer's inputs and leave it only those, refitted.

    Args:
        step: says how.
        name: of the layer.
        reader: the layer.
        groups: its inputs by group, int64 [groups, size].
        makers: squared weights of what makes each group, float32 [groups].
        keep: how many groups stay.
        parts: the block as it is.
        inputs: its calibration texts.

    Returns:
        The groups that stay, int64 [keep], ascending.
    """
    import torch

    from compress.methods.prune.groups import Spread, by_error, damped, highest, refitted
    from compress.models.network.surgery import take

    weight, groups = reader.weight.data.float(), groups.to(reader.weight.device)
    if keep == len(groups):
        return torch.arange(keep, device=groups.device)
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}.weight holds NaN or infinity")
    squares = weight.square().sum(dim=0)
    if not step.calibrates:
        left = highest(squares[groups].sum(dim=1) + makers, keep)
        take(reader, columns=groups[left].flatten())
        return left
    assert inputs is not None, f"{step.method} calibrates"
    _, found = inputs.gather(parts, {name: reader}, Spread)
    mean, spread = found[name].about(mean=step.refit and reader.bias is not None)
    covariance = damped(spread, step.damping)
    if step.criterion == "error":
        left = by_error(weight, covariance, groups, keep)
    elif step.criterion == "activation":
        left = highest((squares * spread.diagonal())[groups].sum(dim=1), keep)
    else:
        left = highest(squares[groups].sum(dim=1) + makers, keep)
    kept = groups[left].flatten()
    made = refitted(weight, covariance, spread, kept) if step.refit else weight[:, kept]
    if step.refit and reader.bias is not None:
        reader.bias.data += (weight @ mean - made @ mean[kept]).to(reader.bias.dtype)
    take(reader, columns=kept)
    reader.weight.data = made.to(reader.weight.dtype)
    return left
