"""NV-Embed without its head: its Mistral, still without a causal mask, with plain mean pooling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method
from compress.models.architectures import HEAD_PREFIX
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

BACKBONE_PREFIX = "embedding_model."


class MeanPooling(Method):
    """Drop the latent-attention head. This changes the vectors, so the model has to be distilled afterwards to be useful.

    The result is a model that other libraries can load: a Mistral that is not causal by its config, with mean pooling and a
    tokenizer that adds the end-of-text token itself.
    """

    family: ClassVar[str] = "smaller"
    method: Literal["mean_pooling"] = "mean_pooling"
    whole: ClassVar[bool] = True

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Keep only the backbone, with its own tensor names.

        Raises:
            ValueError: the model is aligned to another one, by a map from the vectors that the head gives.
        """
        from compress.models.network.pooling import attach_head, backbone_of

        if model.spec.modules:
            raise ValueError("the model's head ends in a map that needs the latent attention; put mean_pooling before align")
        weights = model.weights.renamed(_backbone_name)
        config = _plain(model.config)
        tokenizer = model.tokenizer.ending_itself()
        backbone = attach_head(backbone_of(model.network), tokenizer.spec)
        made = replace(model, network=backbone, weights=weights, config=config, tokenizer=tokenizer, spec=tokenizer.spec)
        return self, replace(made, depths=())

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size: that of the backbone.

        Raises:
            ValueError: the model has no such head.
        """
        if not any(name.startswith(HEAD_PREFIX) for name in shape.tensors):
            raise ValueError(f"{shape.name} has no latent-attention head to drop")
        tensors = {new: info for name, info in shape.tensors.items() if (new := _backbone_name(name)) is not None}
        after = replace(shape, tensors=tensors, config=_plain(shape.config)).as_stored()
        saved = shape.parameters - after.parameters
        return Estimate(
            after=after,
            memory_bytes=0,
            bytes_touched=0,
            note=f"latent-attention head dropped, {saved / 1e6:,.1f} M fewer parameters",
        )

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Do nothing: `prepare` has dropped the head before the walk."""
        return {}


def _backbone_name(name: str) -> str | None:
    return name.removeprefix(BACKBONE_PREFIX) if name.startswith(BACKBONE_PREFIX) else None


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the backbone's config as a transformers Mistral config without a causal mask."""
    # The published file has a sliding window, which the original code does not apply.
    own = {"model_type": "mistral", "architectures": ["MistralModel"], "is_causal": False, "sliding_window": None}
    return {**{key: value for key, value in config["text_config"].items() if key != "_name_or_path"}, **own}
