"""What methods that prune single weights share: how many weights to remove, in which pattern, and the estimate."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Estimate
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


class PruneWeights(LinearsMethod):
    """A method that sets weights of linear layers to zero.

    They are stored as one bit per weight plus the remaining values, and multiplied as dense matrices: the file gets smaller, the
    products do not get faster.
    """

    family: ClassVar[str] = "sparse"
    sparsity: float = Field(0.5, gt=0, lt=1)
    """Share of a layer's weights that are set to zero."""
    pattern: Literal["unstructured", "2:4", "4:8"] = "unstructured"
    """Which weights may be removed. `2:4`: two of every four neighbours in a row, `4:8`: four of every eight, as sparse matrix
    products on some GPUs need it. `unstructured`: any."""

    @model_validator(mode="after")
    def _a_pattern_has_its_own_share(self) -> Self:
        if self.pattern in GROUPS and self.sparsity != 0.5:
            raise ValueError(f"`pattern: {self.pattern}` takes half of the weights; leave `sparsity` out")
        return self

    @property
    def group(self) -> tuple[int, int] | None:
        """How many weights are removed of how many neighbours in a row; None: any weights."""
        return GROUPS.get(self.pattern)

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
            self._check_group(name, linear.in_features)
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
            self._check_group(name, linears[name].shape[1])
            tensors[f"{name}.weight"] = TensorInfo("F16", linears[name].shape, 1 - self.sparsity)
        weights = sum(linears[name].parameters for name in chosen)
        largest = max(linears[name].parameters for name in chosen)
        stored = sum(tensors[f"{name}.weight"].bytes for name in chosen)
        what = f"{100 * self.sparsity:.0f} %" if self.group is None else f"{self.pattern} of them"
        return Estimate(
            after=replace(shape, tensors=tensors),
            memory_bytes=2 * largest * 4 + self.work_bytes([linears[name] for name in chosen]),
            bytes_touched=weights * (4 + 4),
            flops=self.work_flops([linears[name] for name in chosen]),
            note=f"{len(chosen)} linear layers, {weights / 1e6:,.1f} M weights, {what} set to zero; "
            f"{8 * stored / weights:.2f} bits per weight of these layers instead of {8 * HALF_BYTES}",
        )

    def _check_group(self, name: str, inputs: int) -> None:
        if self.group and inputs % self.group[1]:
            raise ValueError(f"{name} has {inputs} inputs, which is no multiple of {self.group[1]}; leave it out with `skip`")


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
