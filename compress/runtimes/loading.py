"""From a name to an Embedder: a built-in name, a folder, a run, or a model on the hub. Imports no torch until it loads."""

from __future__ import annotations

import importlib
import importlib.resources
from typing import TYPE_CHECKING

from compress.common.errors import UserError
from compress.common.memory import available_memory_bytes, gigabytes
from compress.models.files.variant import VariantInfo
from compress.models.shape import read_shape
from compress.models.source import DTYPE_BYTES, Source, find
from compress.runtimes.contract import AUTO, RUNTIMES, TORCH, pick_runtime, runtime_named

if TYPE_CHECKING:
    from compress.models.embedder import Embedder


def runtime_of(source: Source, runtime: str | None = None, *, device: str | None = None, dtype: str | None = None) -> str:
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
    if runtime is not None and runtime != AUTO:
        runtime_named(runtime)
    if not source.is_variant:
        if runtime not in (None, AUTO, TORCH):
            raise UserError(
                f"model {source.name!r}: {runtime} executes variants, and this is a checkpoint",
                f"make one: compress run recipes/bf16-openvino.yaml --model {source.name}",
            )
        return TORCH
    info = VariantInfo.read(source.folder)
    return pick_runtime(runtime or info.runtime, info.quantized, device=device or "cpu", dtype=dtype)


def preload(model: str, runtime: str | None = None, **_: object) -> None:
    """Import everything that loading this model would import, so that what loading itself takes can be measured."""
    source = find(model)
    name = runtime_of(source, runtime)
    importlib.import_module(RUNTIMES[name].opener)
    if name == TORCH:
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
    if name != TORCH:
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
