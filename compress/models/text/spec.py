"""Everything about an embedder besides its network: pooling, normalisation, prompts, lengths. No torch here.

Read from a sentence-transformers folder (`modules.json` and what it points to); a plain transformers folder gets
sentence-transformers' own defaults: mean pooling, no normalisation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compress.common.errors import UserError, nearest
from compress.common.inputs import read_json


class Pooling(StrEnum):
    """How token vectors become one text vector."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "lasttoken"


class EmbedderSpec(BaseModel):
    """The part of an embedder that is not its network; stored with every variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling = Pooling.MEAN
    pool_prompt: bool = True
    """Whether the prompt's own tokens enter the mean (sentence-transformers' `include_prompt`)."""
    normalize: bool = False
    max_length: int | None = None
    """Longest input in tokens, special tokens counted; None: what the tokenizer or the network's positions allow."""
    lowercase: bool = False
    suffix: str = ""
    """Appended to every text before tokenizing; lost, like any end of a text, when the text is too long."""
    prompt_specials: bool = True
    """Whether the special tokens before a prompt count among its tokens."""
    prompts: dict[str, str] = {}
    default_prompt: str = ""
    """Put before every text for which the caller names no prompt."""


def _read_pooling(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing, though modules.json names a pooling module there")
    config = read_json(path)
    legacy = {
        "pooling_mode_cls_token": "cls",
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_lasttoken": "lasttoken",
        "pooling_mode_max_tokens": "max",
        "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "pooling_mode_weightedmean_tokens": "weightedmean",
    }
    modes = config.get("pooling_mode") or [mode for key, mode in legacy.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in list(Pooling):
        supported = ", ".join(Pooling)
        raise UserError(f"{path}: pooling {' + '.join(modes)!r} is not supported", f"supported: one of {supported}")
    return {"pooling": modes[0], "pool_prompt": bool(config.get("include_prompt", True))}


TRANSFORMER = "Transformer"
MODULES: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    TRANSFORMER: lambda _: {},
    "Pooling": _read_pooling,
    "Normalize": lambda _: {"normalize": True},
}
"""Modules that a model may have, and what each one's folder says of the spec."""


@dataclass(frozen=True)
class Module:
    """An entry of sentence-transformers' `modules.json`."""

    kind: str
    """Name of its class, without the package."""
    folder: Path
    """Where its own files are."""


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Return the modules that a folder's `modules.json` lists, in order; none where there is no such file."""
    path = folder / "modules.json"
    if not path.exists():
        return ()
    return tuple(Module(str(entry["type"]).rsplit(".", 1)[-1], folder / str(entry["path"])) for entry in read_json(path))


def transformer_of(folder: Path, modules: Sequence[Module]) -> Path:
    """Return where the network's own files are: the Transformer module's folder; the model's own where none is listed."""
    return next((module.folder for module in modules if module.kind == TRANSFORMER), folder)


def read_spec(folder: Path, modules: Sequence[Module]) -> EmbedderSpec:
    """Read the spec of a sentence-transformers or plain transformers folder.

    Raises:
        UserError: a module, a pooling mode or a file that this workbench does not know or cannot read.
    """
    found: dict[str, Any] = {}
    for module in modules:
        if module.kind not in MODULES:
            raise UserError(f"{folder / 'modules.json'}: module {module.kind!r} is not supported", nearest(module.kind, MODULES))
        found |= MODULES[module.kind](module.folder)
    settings = transformer_of(folder, modules) / "sentence_bert_config.json"
    if settings.exists():
        config = read_json(settings)
        found |= {"max_length": config.get("max_seq_length"), "lowercase": bool(config.get("do_lower_case", False))}
    prompts = folder / "config_sentence_transformers.json"
    if prompts.exists():
        config = read_json(prompts)
        found["prompts"] = {name: text for name, text in (config.get("prompts") or {}).items() if text}
        default = config.get("default_prompt_name")
        if default is not None:
            if default not in (config.get("prompts") or {}):
                raise UserError(f"{prompts}: default_prompt_name {default!r} is not among the prompts")
            found["default_prompt"] = config["prompts"][default] or ""
    return EmbedderSpec(**found)
