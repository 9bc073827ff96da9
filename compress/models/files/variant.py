"""A variant on disk: what `variant.json` says beside its safetensors files, `config.json` and `tokenizer.json`. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.common.errors import UserError
from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.models.architectures import Sublayer
from compress.models.text.spec import EmbedderSpec

VARIANT_FILE = "variant.json"
WEIGHTS_FILE = "model.safetensors"


class VariantInfo(BaseModel):
    """Everything a runtime needs to know of a variant besides its tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    base: str
    """Name of the model that it was made from."""
    base_fingerprint: str
    licence: str | None
    """Licence of the base model, as far as its files name it; it holds for the variant too."""
    max_length: int
    spec: EmbedderSpec
    pretrained: bool = True
    """False: made from random weights, to measure speed and memory; its vectors mean nothing."""
    folded: bool = False
    """Whether NV-Embed's latent head is folded."""
    runtime: str = "torch"
    """What it was made for and measured in; `compress.load` opens it there."""
    dtype: str | None = None
    """Of the floating-point arithmetic in that runtime; None: its default on the device."""
    layers: tuple[int, ...] | None = None
    """Which block of the published model each block is, from 0; None in variants of earlier versions, which have all."""
    heads: int | None = None
    """Attention heads of each block, where these are fewer than its config can say."""
    dropped: tuple[tuple[int, Sublayer], ...] = ()
    """Sublayers that its blocks lack, by the block's number here."""
    quantized: dict[str, QuantizedLayer]
    """Linear layers and tables, by their names in the network."""
    steps: list[dict[str, Any]]
    """The recipe's steps as they were applied, defaults filled in."""

    @property
    def weights(self) -> str:
        """Say what the weights are: `int8`, several joined by `+`, or `float16` where nothing is quantized; and how many went."""
        numbers = "+".join(sorted({layer.name for layer in self.quantized.values()})) or "float16"
        return " ".join([numbers, *(words for step in self.steps for words in _pruned(step))])

    @property
    def activations(self) -> str:
        """Name the activation scheme, or several joined by `+`; tables have none and are not asked."""
        schemes = {layer.activations for layer in self.quantized.values()}
        return "+".join(sorted(schemes - {ActivationScheme.NONE})) or ActivationScheme.NONE

    def write(self, folder: Path) -> None:
        """Write `variant.json`."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False)
        (folder / VARIANT_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> VariantInfo:
        """Read `variant.json`.

        Raises:
            UserError: it is not of a format that this version reads.
        """
        path = folder / VARIANT_FILE
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {place}: {first['msg']}", "it may have been written by another version") from error


def _pruned(step: dict[str, Any]) -> list[str]:
    """Say in a word or two what a step took away; nothing of steps that only change numbers."""
    if "sparsity" in step:
        return [f"{step['sparsity']:.0%} zeros" if step["pattern"] == "unstructured" else step["pattern"]]
    if step["method"] == "depth" and step["drop"]:
        what = step["what"] if len(step["drop"]) != 1 else step["what"].removesuffix("s")
        return [f"less {len(step['drop'])} {what}"]
    if step["method"] == "width":
        return [f"{step[key]:.3g} of {key}" for key in ("heads", "channels") if step[key] < 1]
    return []
