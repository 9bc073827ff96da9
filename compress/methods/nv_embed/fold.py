"""Fold NV-Embed's latent-attention head: 505 M fewer parameters for NV-Embed-v2, with the same vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Estimate, Method
from compress.models.architectures import HEAD_PREFIX
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts

HEAD = HEAD_PREFIX
ATTEND, FEED = f"{HEAD}cross_attend_blocks.0", f"{HEAD}cross_attend_blocks.1"
DOUBLE_BYTES = 8


class Fold(Method):
    """Precompute the products that depend only on the latents, and move the last product to after the mean.

    Exact up to rounding; `compress.models.network.nv_embed.FoldedLatentAttention` derives it. A model without such a head is
    refused.
    """

    family: ClassVar[str] = "as it was"
    method: Literal["fold"] = "fold"

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: two matrices [heads x latents, width] instead of queries, keys, values, output and latents.

        Raises:
            ValueError: the model has no such head, or its head is folded already.
        """
        if f"{HEAD}latents" not in shape.tensors:
            raise ValueError(f"{shape.name} has no latent-attention head to fold")
        query, latents = shape.tensors[f"{ATTEND}.fn.to_q.weight"], shape.tensors[f"{HEAD}latents"]
        inner, width = query.shape
        # The weights do not show the number of heads; it is in the config, or else the original code's default of 8.
        heads = int(shape.config.get("latent_attention_config", {}).get("num_cross_heads", 8))
        rows = heads * latents.shape[0]
        kept = {name: info for name, info in shape.tensors.items() if not name.startswith(HEAD)}
        for part in ("weight", "bias"):
            kept[f"{HEAD}norm.{part}"] = shape.tensors[f"{ATTEND}.norm.{part}"]
            kept[f"{HEAD}feed_norm.{part}"] = shape.tensors[f"{FEED}.norm.{part}"]
            for index in (0, 2):
                kept[f"{HEAD}net.{index}.{part}"] = shape.tensors[f"{FEED}.fn.net.{index}.{part}"]
        kept[f"{HEAD}scores.weight"] = TensorInfo(query.dtype, (rows, width))
        kept[f"{HEAD}values.weight"] = TensorInfo(query.dtype, (width, rows))
        after = replace(shape, tensors=kept).as_stored()
        saved = shape.parameters - after.parameters
        return Estimate(
            after=after,
            memory_bytes=(2 * rows * width + 4 * width * inner // heads) * DOUBLE_BYTES,
            bytes_touched=(3 * query.parameters + latents.parameters) * DOUBLE_BYTES,
            note=f"latent-attention head folded, {saved / 1e6:,.1f} M fewer parameters, exact up to rounding",
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace the published head by the folded one, if the segment is the head."""
        name = HEAD.rstrip(".")
        if name in parts:
            from compress.models.network.nv_embed import LatentAttention, fold

            head = parts[name]
            assert isinstance(head, LatentAttention)  # `estimate` refuses models without one, or with a folded one
            parts[name] = fold(head)
        return {}
