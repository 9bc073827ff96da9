"""What methods that prune single weights share: how many weights to remove, in which pattern, and the estimate."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Estimate, StepOverride, check_overrides, overridden
from compress.methods.linear_layers import LinearsMethod
from compress.models.files.headers import TensorInfo
from compress.models.shape import HALF_BYTES, ModelShape

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts

GROUPS = {"2:4": (2, 4), "4:8": (4, 8)}
"""How many weights are removed, of how many neighbours in a row."""
Pattern = Literal["unstructured", "2:4", "4:8"]


class SparsityOverride(StepOverride):
    """Sparsity of the layers that match a pattern, where it differs from the step's own."""

    sparsity: float | None = Field(None, gt=0, lt=1)
    """Share of a layer's weights that are set to zero; by default the step's own."""
    pattern: Pattern | None = None
    """Which weights may be removed; by default the step's own."""


@dataclass(frozen=True)
class Sparsity:
    """How many weights of a layer are removed, and which may be."""

    share: float
    """Share of the weights."""
    pattern: Pattern

    @property
    def group(self) -> tuple[int, int] | None:
        """How many weights are removed of how many neighbours in a row; None: any weights."""
        return GROUPS.get(self.pattern)

    @property
    def words(self) -> str:
        """What is removed, for people."""
        return f"{100 * self.share:.0f} %" if self.group is None else f"{self.pattern} of them"


class PruneWeights(LinearsMethod):
    """A method that sets weights of linear layers to zero.

    They are stored as one bit per weight plus the remaining values, and multiplied as dense matrices: the file gets smaller, the
    products do not get faster.
    """

    family: ClassVar[str] = "sparse"
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of a layer's weights that are set to zero."""
    pattern: Pattern = "unstructured"
    """Which weights may be removed. `2:4`: two of every four neighbours in a row, `4:8`: four of every eight, as sparse matrix
    products on some GPUs need it. `unstructured`: any."""
    overrides: dict[str, SparsityOverride] = Field(default={})
    """Other sparsities for some layers, by pattern of their names, such as {"*.down_proj": {sparsity: 0.3}}; the last match
    wins."""

    @model_validator(mode="after")
    def _a_pattern_has_its_own_share(self) -> Self:
        kinds: list[PruneWeights | SparsityOverride] = [self, *self.overrides.values()]
        for one in kinds:
            if one.pattern in GROUPS and one.sparsity not in (None, 0.5):
                raise ValueError(f"`pattern: {one.pattern}` takes half of the weights; leave `sparsity` out")
        return self

    @field_validator("overrides")
    @classmethod
    def _overrides_say_something(cls, overrides: dict[str, SparsityOverride]) -> dict[str, SparsityOverride]:
        check_overrides(overrides)
        return overrides

    def overriding(self) -> Mapping[str, StepOverride]:
        """Return `overrides`."""
        return self.overrides

    def sparsity_of(self, name: str) -> Sparsity:
        """Return the step's own sparsity, changed by the overrides that match the layer's name.

        A pattern takes half of the weights, whatever share was set where it is not.

        Raises:
            ValueError: overrides give the layer a pattern, and a share that is not the pattern's.
        """
        settings = overridden(name, self.overrides)
        pattern = settings.get("pattern", self.pattern)
        if pattern not in GROUPS:
            return Sparsity(settings.get("sparsity", self.sparsity), pattern)
        if settings.get("sparsity", 0.5) != 0.5:
            raise ValueError(f"{name}: `pattern: {pattern}` takes half of the weights; leave `sparsity` out")
        return Sparsity(0.5, pattern)

    @abstractmethod
    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """Set weights of the chosen layers to zero; other weights may be changed to make up for them.

        Args:
            parts: the segment's modules.
            linears: the layers to prune, by name; at least one.
            inputs: the calibration texts as they arrive at the segment; not None if the method calibrates.
        """

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Prune every chosen `nn.Linear` of a segment; see `prune`.

        Raises:
            ValueError: a weight is NaN or infinite, or a pattern's groups do not divide a layer's inputs.
        """
        linears = self.linears_in(parts)
        for name, linear in linears.items():
            _check_group(name, self.sparsity_of(name), linear.in_features)
        if linears:
            self.prune(parts, linears, inputs)
        return {}

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: one bit per weight of the chosen layers, and half precision for the remaining weights.

        Raises:
            ValueError: a pattern matches no linear layer, no layer is left, or a layer's inputs are no multiple of the group.
        """
        linears, chosen = self.linears_of(shape)
        tensors = dict(shape.as_stored().tensors)
        for name in chosen:
            wanted = self.sparsity_of(name)
            _check_group(name, wanted, linears[name].shape[1])
            tensors[f"{name}.weight"] = TensorInfo("F16", linears[name].shape, 1 - wanted.share)
        weights = sum(linears[name].parameters for name in chosen)
        largest = max(linears[name].parameters for name in chosen)
        stored = sum(tensors[f"{name}.weight"].bytes for name in chosen)
        kinds = {self.sparsity_of(name) for name in chosen}
        what = " or ".join(sorted(kind.words for kind in kinds))
        return Estimate(
            after=replace(shape, tensors=tensors),
            memory_bytes=2 * largest * 4 + self.work_bytes([linears[name] for name in chosen]),
            bytes_touched=weights * (4 + 4),
            flops=self.work_flops([linears[name] for name in chosen]),
            note=f"{len(chosen)} linear layers, {weights / 1e6:,.1f} M weights, {what} set to zero; "
            f"{8 * stored / weights:.2f} bits per weight of these layers instead of {8 * HALF_BYTES}",
        )


def _check_group(name: str, wanted: Sparsity, inputs: int) -> None:
    if wanted.group and inputs % wanted.group[1]:
        raise ValueError(f"{name} has {inputs} inputs, which is no multiple of {wanted.group[1]}; leave it out with `skip`")


def lowest_in_groups(scores: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """Mark the lowest scores of each group of neighbours in a row, `group` as in `GROUPS`: [rows, n] to bool [rows, n]."""
    import torch

    goes, of = group
    grouped = scores.view(len(scores), -1, of)
    marked = torch.zeros(grouped.shape, dtype=torch.bool, device=scores.device)
    return marked.scatter_(2, grouped.argsort(dim=2, stable=True)[:, :, :goes], True).view(scores.shape)


def lowest_in_rows(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the lowest `share` of the scores of each row: [rows, n] to bool [rows, n]."""
    import torch

    marked = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return marked.scatter_(1, scores.argsort(dim=1, stable=True)[:, : round(share * scores.shape[1])], True)


def lowest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """Mark the lowest `share` of all scores: [rows, n] to bool [rows, n]."""
    return lowest_in_rows(scores.reshape(1, -1), share).view(scores.shape)
