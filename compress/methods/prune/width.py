"""Width pruning: attention heads and MLP channels are dropped, and the layers that read them are refitted to their old outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

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


class Width(Method):
    """Drop the same share of heads, and of MLP channels, in every block; the model's config then has the smaller numbers.

    Blocks are narrowed one after another, each with the inputs that the narrowed blocks before it make, heads before channels. The
    layer that reads the remaining channels is refitted in closed form: least squares against its outputs with all channels, on the
    calibration tokens. BERT's config cannot give the number of heads apart from their width, so a BERT without some of its heads
    runs only here.
    """

    family: ClassVar[str] = "smaller"
    method: Literal["width"] = "width"
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

    @model_validator(mode="after")
    def _drops_something(self) -> Self:
        if self.channels == self.heads == 1:
            raise ValueError("keeps everything; give `channels` or `heads`, a share below 1")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the choice or the refit needs the inputs."""
        return self.refit or self.criterion != "magnitude"

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Put the new sizes into the config, or into the variant if the config has no key for them."""
        shape = model.shape
        after, anatomy = self.estimate(shape).after, shape.anatomy
        heads = model.heads
        if self.heads < 1 and not anatomy.heads_in_config:
            heads = self._left_of(shape, anatomy)[1][anatomy.output] // shape.head_width
        return self, replace(model, config=after.config, heads=heads)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Narrow a block: heads first, so that the MLP's inputs are those that the narrowed attention makes.

        Raises:
            ValueError: a second moment has no Cholesky factor.
        """
        for path, block in parts.items():
            if is_in_block(path) and self.heads < 1:
                self._narrow_attention(path, block, parts, inputs)
            if is_in_block(path) and self.channels < 1:
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
        reader = _Reader(f"{path}.{anatomy.output}", layers[anatomy.output], groups, makers, self._heads(keys))
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
        reader = _Reader(f"{path}.{anatomy.down}", falling, groups, makers, self._channels(channels))
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
        if tensors == shape.as_stored().tensors:
            raise ValueError(f"{shape.name} keeps all of its heads and channels at these shares; lower them, or leave the step out")
        changes = {}
        if anatomy.down in columns:
            changes[anatomy.channels_key] = columns[anatomy.down]
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
            note=f"{' and '.join(kept)} kept in each block, {(shape.parameters - after.parameters) / 1e6:,.1f} M fewer parameters"
            + (", the layers that read them refitted" if self.refit else ""),
        )

    def _left_of(self, shape: ModelShape, anatomy: Anatomy) -> tuple[dict[str, int], dict[str, int]]:
        """Return the numbers of rows and of columns that layers of a block keep, by name."""
        sizes: dict[str, tuple[int, ...]] = {}
        for name, info in shape.tensors.items():
            at = place_in_block(name)
            if at is not None:
                sizes[at[1]] = info.shape
        for layer in (anatomy.output, anatomy.down):
            if f"{layer}.weight_scale" in sizes:
                raise ValueError(f"{shape.name}: {layer} is quantized by an earlier step; put width before it")
        rows: dict[str, int] = {}
        columns: dict[str, int] = {}
        if self.channels < 1:
            columns[anatomy.down] = self._channels(sizes[f"{anatomy.down}.weight"][1])
            rows |= dict.fromkeys(anatomy.up, anatomy.halves * columns[anatomy.down])
        if self.heads < 1:
            if "heads" in anatomy.refused:
                raise ValueError(f"{shape.name}: heads cannot be dropped, because {anatomy.refused['heads']}; leave `heads` out")
            if len(anatomy.attention) == 1:
                raise ValueError(f"{shape.name}: {anatomy.attention[0]} makes queries, keys and values in one; leave `heads` out")
            width = shape.head_width
            before = {layer: sizes[f"{layer}.weight"][0] // width for layer in anatomy.attention}
            keys = before[anatomy.attention[1]]
            rows |= {layer: self._heads(keys) * count // keys * width for layer, count in before.items()}
            columns[anatomy.output] = rows[anatomy.attention[0]]
        return rows, columns

    def _channels(self, channels: int) -> int:
        """Return the number of channels that stay."""
        return min(channels, max(1, share_of(self.channels / MULTIPLE, channels)) * MULTIPLE)

    def _heads(self, groups: int) -> int:
        """Return the number of heads, or of groups of heads with common keys and values, that stay.

        Raises:
            ValueError: none would.
        """
        left = share_of(self.heads, groups)
        if left == 0:
            raise ValueError(f"`heads: {self.heads}` leaves none of {groups} heads (counted where keys and values are made)")
        return left
