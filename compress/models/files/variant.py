"""`variant.json`, which describes a variant next to its safetensors files, `config.json` and `tokenizer.json`. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from compress.common.files import write_text_atomic
from compress.common.inputs import read_as
from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.models.architectures import Sublayer
from compress.models.text.spec import EmbedderSpec

VARIANT_FILE = "variant.json"
WEIGHTS_FILE = "model.safetensors"


class AlignedTo(BaseModel):
    """The model in whose space a variant's vectors lie, so that they can search that model's index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Name of that model."""
    fingerprint: str
    """Fingerprint of that model's files; an index made with other files is another index."""
    method: Literal["rotation", "linear"]
    """The map from the variant's own vectors to that space."""
    trained: bool = False
    """Whether the network was trained towards that model's vectors after the map was fitted."""
    task: Literal["query", "document"] = "query"
    """What the texts were embedded as, by both models."""
    texts: int
    """Number of texts that the map was fitted on."""
    held_out: int
    """Number of texts that it was not fitted on, and that the rest was measured on."""
    cosine_mean: float
    """Mean cosine between the variant's vector of a held-out text and that model's."""
    cosine_p1: float
    """First percentile of these cosines."""
    overlap_at_10: float
    """Shared part of a held-out text's ten nearest other held-out texts, all of them embedded by that model."""


class BlockSizes(BaseModel):
    """Sizes of one block that `config.json` cannot say, because it has one number for all blocks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    block: int = Field(ge=0)
    """The block's number in the variant."""
    channels: int | None = Field(None, ge=1)
    """Number of its MLP's channels; None: as the config says."""
    heads: int | None = Field(None, ge=1)
    """Number of its query heads; None: as the config, or `VariantInfo.heads`, says."""
    key_heads: int | None = Field(None, ge=1)
    """Number of its heads of keys and values; None: as many as `heads`."""


class VariantInfo(BaseModel):
    """Everything that a runtime needs to know about a variant except its tensors: the content of `variant.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    """Version of the file format."""
    base: str
    """Name of the model that the variant was made from."""
    base_fingerprint: str
    """Fingerprint of the base model's files; see `compress.models.files.headers.fingerprint`."""
    licence: str | None
    """Licence of the base model, which applies to the variant too; None if the model's files do not name one."""
    max_length: int = Field(ge=1)
    """Maximum length of a text in tokens, including special tokens."""
    spec: EmbedderSpec
    """How the model takes texts and pools tokens."""
    pretrained: bool = True
    """Whether the weights come from training. Random weights serve to measure speed and memory; their vectors are meaningless."""
    folded: bool = False
    """Whether NV-Embed's latent-attention head is folded."""
    runtime: str = "torch"
    """Name of the runtime that the variant was made for and measured in. `compress.load` uses it by default."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the floating-point arithmetic in that runtime; None for the runtime's default on the device."""
    layers: tuple[int, ...] | None = None
    """The number that each block has in the published model, from 0; None in variants of earlier versions, which have all."""
    heads: int | None = Field(None, ge=1)
    """Number of attention heads of each block, if heads were pruned and the config cannot store it; else None."""
    dropped: tuple[tuple[int, Sublayer], ...] = ()
    """The sublayers that were dropped, each with its block's number in the variant."""
    blocks: tuple[BlockSizes, ...] = ()
    """Sizes of blocks that differ from each other; empty, as in variants of earlier versions: the config's apply to all."""
    quantized: dict[str, QuantizedLayer]
    """The quantized linear layers and tables, by their names in the network."""
    aligned_to: AlignedTo | None = None
    """The model whose index the variant's vectors search; None, as in variants of earlier versions: only its own."""
    depths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """The numbers of blocks to which the variant was trained to be cut, its own included; empty, as in variants of earlier
    versions: its vectors are good after the last block only."""
    steps: list[dict[str, Any]]
    """The recipe's steps as they were applied, with defaults filled in."""

    @field_validator("spec", mode="before")
    @classmethod
    def _names_its_pooling(cls, spec: Any) -> Any:
        """Every version wrote the pooling; without it the default of another model would be taken."""
        if isinstance(spec, dict) and "pooling" not in spec:
            raise ValueError("names no pooling")
        return spec

    @property
    def weights(self) -> str:
        """The kind of weights, such as `int8` or `int4+int8`; `float16` if none are quantized; and what was pruned."""
        numbers = "+".join(sorted({layer.name for layer in self.quantized.values()})) or "float16"
        return " ".join([numbers, *(words for step in _together(self.steps) for words in _pruned(step))])

    @property
    def activations(self) -> str:
        """The activation schemes of the quantized layers, joined by `+`; `none` if activations are not quantized."""
        schemes = {layer.activations for layer in self.quantized.values()}
        return "+".join(sorted(schemes - {ActivationScheme.NONE})) or ActivationScheme.NONE

    def write(self, folder: Path) -> None:
        """Write `variant.json`."""
        # A variant that needs none of these keys stays readable by versions that do not know them.
        unneeded: dict[str, Any] = {key: True for key in ("aligned_to", "blocks", "depths") if not getattr(self, key)}
        if not self.spec.rotated:
            unneeded["spec"] = {"rotated"}
        text = json.dumps(self.model_dump(mode="json", exclude=unneeded), indent=1, ensure_ascii=False)
        write_text_atomic(folder / VARIANT_FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> VariantInfo:
        """Read `variant.json`.

        Raises:
            UserError: this version does not read the file's format.
        """
        return read_as(folder / VARIANT_FILE, cls, "it may have been written by another version")


def _together(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return steps such that what rounds drop bit by bit is in one of them: the blocks of all, and the product of the shares."""
    made: list[dict[str, Any]] = []
    for step in steps:
        same = [one["method"] == step["method"] and one.get("what") == step.get("what") for one in made]
        place = same.index(True) if True in same else None
        if place is not None and step["method"] == "depth" and step["drop"] and made[place]["drop"]:
            made[place] = {**step, "drop": [*made[place]["drop"], *step["drop"]]}
        elif place is not None and step["method"] == "width" and not (step.get("overrides") or made[place].get("overrides")):
            made[place] = {**step, **{key: made[place][key] * step[key] for key in ("heads", "channels")}}
        else:
            made.append(step)
    return made


def _pruned(step: dict[str, Any]) -> list[str]:
    """Describe what a step pruned in a word or two; empty for steps that prune nothing."""
    overrides = step.get("overrides", {}).values()
    if "sparsity" in step:
        kinds = [step["pattern"], *(pattern for other in overrides if (pattern := other.get("pattern")) is not None)]
        shares = [step["sparsity"], *(share for other in overrides if (share := other.get("sparsity")) is not None)]
        zeros = f"{'/'.join(f'{share:.0%}' for share in sorted(set(shares)))} zeros"
        return [zeros if kind == "unstructured" else kind for kind in dict.fromkeys(kinds)]
    if step["method"] == "depth" and step["drop"]:
        what = step["what"] if len(step["drop"]) != 1 else step["what"].removesuffix("s")
        return [f"less {len(step['drop'])} {what}"]
    if step["method"] == "width":
        kept = {key: {step[key], *(one[key] for one in overrides if one.get(key) is not None)} for key in ("heads", "channels")}
        return [f"{'/'.join(f'{one:.3g}' for one in sorted(shares))} of {key}" for key, shares in kept.items() if min(shares) < 1]
    return []
