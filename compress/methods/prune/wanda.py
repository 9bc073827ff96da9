"""Wanda: the weights go that are small and have small inputs; the others stay as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.methods.prune.base import PruneWeights, lowest_in_groups, lowest_in_rows

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class Wanda(PruneWeights):
    """Set the weights with the smallest |W_ij| * |X_j| to zero, of each output channel or of each group.

    |X_j| is the norm of an input channel over the calibration tokens (Sun et al. 2023, arXiv 2306.11695, section 3).
    """

    method: Literal["wanda"] = "wanda"

    @property
    def calibrates(self) -> bool:
        """It does."""
        return True

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`."""
        from compress.calibration.statistics import Moments

        assert inputs is not None  # the step said that it calibrates
        groups, moments = inputs.gather(parts, linears, Moments)
        for leader, names in groups.items():
            size = moments.pop(leader).mean_square.sqrt()
            for name in names:
                scores = linears[name].weight.detach().float().abs() * size
                gone = lowest_in_groups(scores, self.group) if self.group else lowest_in_rows(scores, self.sparsity)
                linears[name].weight.data.masked_fill_(gone, 0)
