"""Magnitude pruning: the smallest weights of a layer go. No calibration, seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.methods.prune.base import PruneWeights, lowest, lowest_in_groups

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class Magnitude(PruneWeights):
    """Set the smallest weights to zero, of each layer as a whole or of each group (Han et al. 2015, arXiv 1506.02626).

    To compare with: it does not see that some inputs are large.
    """

    method: Literal["magnitude"] = "magnitude"

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`."""
        for linear in linears.values():
            scores = linear.weight.detach().float().abs()
            gone = lowest_in_groups(scores, self.group) if self.group else lowest(scores, self.sparsity)
            linear.weight.data.masked_fill_(gone, 0)
