"""Wanda: weights that are small and have small inputs are removed; the others stay unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.methods.prune.base import PruneWeights, lowest_in_groups, lowest_in_rows

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class Wanda(PruneWeights):
    """Set the weights with the smallest |W_ij| * |X_j|_2 of each output channel, or of each group, to zero.

    |X_j|_2 is the norm of an input channel over the calibration tokens (Sun et al. 2023, arXiv 2306.11695, section 3).
    """

    method: Literal["wanda"] = "wanda"

    @property
    def calibrates(self) -> bool:
        """Always: the inputs' norms decide."""
        return True

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`."""
        from compress.calibration.statistics import Moments

        for names, moments in self.statistics_of(parts, linears, inputs, Moments):
            size = moments.mean_square.sqrt()  # |X_j|_2, up to the number of tokens
            for name in names:
                # Equation 1: S_ij = |W_ij| * |X_j|_2
                scores = linears[name].weight.detach().float().abs() * size
                # The weights compared with each other are those of one output channel, or of one N:M group.
                wanted = self.sparsity_of(name)
                gone = lowest_in_groups(scores, wanted.group) if wanted.group else lowest_in_rows(scores, wanted.share)
                linears[name].weight.data.masked_fill_(gone, 0)
