"""Fewer latents and fewer heads in NV-Embed's folded latent-attention head."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method, share_of
from compress.models.architectures import HEAD_PREFIX
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

SCORES, VALUES = f"{HEAD_PREFIX}scores", f"{HEAD_PREFIX}values"


class Latents(Method):
    """Keep the latents of each head that get the most attention, and the heads that contribute most. It has to come after the fold.

    Each head keeps its own latents, because heads of a folded head share none. The attention of a dropped latent goes to the others
    through the softmax.
    """

    family: ClassVar[str] = "smaller"
    method: Literal["latents"] = "latents"
    keep: float = Field(1.0, gt=0, le=1)
    """Share of each head's latents that is kept, those with the largest mean attention over pooled tokens; rounded, halves up."""
    heads: float = Field(1.0, gt=0, le=1)
    """Share of the heads that is kept, those whose outputs have the largest mean square; rounded, halves up."""

    @model_validator(mode="after")
    def _drops_something(self) -> Self:
        if self.keep == self.heads == 1:
            raise ValueError("keeps everything; give `keep` or `heads`, a share below 1")
        return self

    @property
    def calibrates(self) -> bool:
        """Always: attention on the calibration texts decides."""
        return True

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Put the new sizes of the head into the config."""
        heads, latents = self._left(*_sizes(model.config))
        return self, replace(model, config=_with_sizes(model.config, heads, latents))

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: fewer rows and columns of the two matrices that the fold made.

        Raises:
            ValueError: there is no folded head, or nothing of it would be left.
        """
        if f"{SCORES}.weight" not in shape.tensors:
            raise ValueError(f"{shape.name} has no folded latent-attention head; `fold: true` folds it")
        before = _sizes(shape.config)
        heads, latents = self._left(*before)
        tensors = dict(shape.as_stored().tensors)
        width = tensors[f"{SCORES}.weight"].shape[1]
        tensors[f"{SCORES}.weight"] = TensorInfo("F16", (heads * latents, width))
        tensors[f"{VALUES}.weight"] = TensorInfo("F16", (width, heads * latents))
        after = replace(shape, tensors=tensors, config=_with_sizes(shape.config, heads, latents))
        rows = before[0] * before[1]
        return Estimate(
            after=after,
            memory_bytes=4 * (rows**2 + 2 * rows * width),
            bytes_touched=4 * 4 * rows * width,
            note=f"{latents} latents and {heads} heads kept in the folded head, "
            f"{(shape.parameters - after.parameters) / 1e6:,.1f} M fewer parameters",
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Cut the head, if the segment is the head."""
        head: Any = parts.get(HEAD_PREFIX.rstrip("."))
        if head is None:
            return {}
        import torch

        from compress.methods.prune.groups import highest
        from compress.models.network.surgery import take

        assert inputs is not None, f"{self.method} calibrates"
        _, found = inputs.gather(parts, {VALUES: head.values}, _Attention)
        attention, second = found[VALUES].mean(), found[VALUES].second.mean()
        columns = torch.arange(len(attention), device=attention.device).view(head.heads, -1)
        values = head.values.weight.data.float()
        # E|V_h a_h|^2 = tr(V_h E[a_h a_h^T] V_h^T): what a head adds to the mean square of the output.
        added = torch.stack([((values[:, one] @ second[one][:, one]) * values[:, one]).sum() for one in columns])
        heads, latents = self._left(*columns.shape)
        chosen = []
        for one in highest(added, heads):
            chosen.append(columns[one][highest(attention[columns[one]], latents)])
        kept = torch.cat(chosen)
        take(head.scores, rows=kept)
        take(head.values, columns=kept)
        head.heads = heads
        return {}

    def _left(self, heads: int, latents: int) -> tuple[int, int]:
        """Return the number of heads that stay, and of latents of each.

        Raises:
            ValueError: none would.
        """
        left = share_of(self.heads, heads), share_of(self.keep, latents)
        if 0 in left:
            raise ValueError(f"leaves {left[0]} of {heads} heads and {left[1]} of {latents} latents")
        return left


class _Attention:
    """Mean and second moment of the tokens' attention."""

    def __init__(self, width: int, device: torch.device) -> None:
        import torch

        from compress.calibration.statistics import Hessian

        self.second = Hessian(width, device)
        self._sum, self._count = torch.zeros(width, device=device, dtype=torch.float64), 0.0

    def add(self, rows: torch.Tensor, counts: torch.Tensor) -> None:
        """Add rows of attention, [n, heads x latents], with the weight of each, float32 [n]."""
        self.second.add(rows, counts)
        self._sum += (counts @ rows.float()).double()
        self._count += float(counts.sum())

    def mean(self) -> torch.Tensor:
        """Return the mean attention, float32 [heads x latents]."""
        return (self._sum / self._count).float()


def _sizes(config: Any) -> tuple[int, int]:
    """Return the numbers of heads and latents of a config, or the original code's defaults."""
    latent = config.get("latent_attention_config", {})
    return int(latent.get("num_cross_heads", 8)), int(latent.get("num_latents_value", 512))


def _with_sizes(config: Any, heads: int, latents: int) -> dict[str, Any]:
    latent = {**config.get("latent_attention_config", {}), "num_cross_heads": heads, "num_latents_value": latents}
    return {**config, "latent_attention_config": latent}
