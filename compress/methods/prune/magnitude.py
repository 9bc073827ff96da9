"""Magnitude pruning: the smallest weights of a layer are removed. No calibration; takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.methods.prune.base import PruneWeights, lowest, lowest_in_groups

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class Magnitude(PruneWeights):
    """Set the smallest weights of each layer, or of each group, to zero (Han et al. 2015, arXiv 1506.02626).

    A baseline: it does not see that some inputs are larger than others.
    """

    method: Literal["magnitude"] = "magnitude"

    def prune(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> None:
        """See `PruneWeights.prune`."""
        for name, linear in linears.items():
            scores, wanted = linear.weight.detach().float().abs(), self.sparsity_of(name)
            gone = lowest_in_groups(scores, wanted.group) if wanted.group else lowest(scores, wanted.share)
            linear.weight.data.masked_fill_(gone, 0)
