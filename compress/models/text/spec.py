"""Everything about an embedder except its network: pooling, normalisation, prompts, lengths. No torch here.

The spec is read from a sentence-transformers folder (`modules.json` and the folders that it lists). A plain transformers folder
gets the defaults of sentence-transformers: mean pooling, no normalisation.
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
    """How the hidden states of a text's tokens become one vector: the first token's, the mean, or the last token's."""

    CLS = "cls"
    MEAN = "mean"
    LAST = "lasttoken"


class EmbedderSpec(BaseModel):
    """Everything about an embedder except its network. It is stored with every variant."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Pooling = Pooling.MEAN
    """How hidden states are pooled into one vector."""
    pool_prompt: bool = True
    """Whether the prompt's tokens are pooled too (`include_prompt` in sentence-transformers)."""
    normalize: bool = False
    """Whether vectors are scaled to unit length."""
    max_length: int | None = None
    """Maximum length of a text in tokens, including special tokens; None for the limit of the tokenizer and the network."""
    lowercase: bool = False
    """Whether texts are converted to lower case before tokenizing."""
    suffix: str = ""
    """String to append to every text before tokenizing. Truncation of a long text removes it."""
    prompt_specials: bool = True
    """Whether the special tokens before a prompt are counted as part of the prompt."""
    prompts: dict[str, str] = {}
    """The model's prompts by name."""
    default_prompt: str = ""
    """Prompt to put before texts for which the caller gives none."""


def _read_pooling(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"{path}: missing, but modules.json lists a pooling module in this folder")
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
"""The supported modules, each with the function that reads its part of the spec from its folder."""


@dataclass(frozen=True)
class Module:
    """An entry of sentence-transformers' `modules.json`."""

    kind: str
    """Name of the module's class, without the package."""
    folder: Path
    """The path of the module's own files."""


def read_modules(folder: Path) -> tuple[Module, ...]:
    """Return the modules that a folder's `modules.json` lists, in order; empty if there is no such file."""
    path = folder / "modules.json"
    if not path.exists():
        return ()
    return tuple(Module(str(entry["type"]).rsplit(".", 1)[-1], folder / str(entry["path"])) for entry in read_json(path))


def transformer_of(folder: Path, modules: Sequence[Module]) -> Path:
    """Return the path of the network's own files: the Transformer module's folder if one is listed, else the model's folder."""
    return next((module.folder for module in modules if module.kind == TRANSFORMER), folder)


def read_spec(folder: Path, modules: Sequence[Module]) -> EmbedderSpec:
    """Read the spec of a sentence-transformers or plain transformers folder.

    Raises:
        UserError: a module or pooling mode is not supported, or a file cannot be read.
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
