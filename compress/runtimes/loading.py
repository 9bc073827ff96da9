"""Loads an Embedder by name: a built-in name, a folder, a run, or a model on the hub. Imports torch only when it loads a model."""

from __future__ import annotations

import importlib
import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from compress.common.errors import UserError, nearest
from compress.common.memory import available_memory_bytes, gigabytes
from compress.models.folder import ModelFolder
from compress.models.source import DTYPE_BYTES, find
from compress.models.text.sentence_transformers import TRANSFORMER
from compress.runtimes.contract import AUTO, PACKED, RUNTIMES, TORCH, Batching, Kind, pick_runtime, runtime_named, usual_device
from compress.runtimes.routed import RoutedEmbedder

if TYPE_CHECKING:
    from compress.models.embedder import Embedder
    from compress.models.text.router import Routes
    from compress.models.text.sentence_transformers import Module


def runtime_of(source: ModelFolder, runtime: str | None = None, *, device: str | None = None, dtype: str | None = None) -> str:
    """Return the runtime that a model is opened in.

    Args:
        source: the model. A checkpoint runs in torch; one that is a static table in numpy too.
        runtime: a runtime's name; `auto` for the fastest one that is installed and executes the model as it is stored; None for the
            one that a variant was made for.
        device: device to run on; None for the GPU if there is one and the runtime is torch, else the CPU.
        dtype: dtype of the floating-point arithmetic; None for any.

    Raises:
        UserError: there is no such runtime, it is not installed, or it does not execute the model.
    """
    if runtime is not None and runtime != AUTO:
        runtime_named(runtime)
    if not source.is_variant:
        if runtime not in (None, AUTO) and not RUNTIMES[runtime].checkpoints:
            recipe = "int4-gptq" if RUNTIMES[runtime].cuda_only else "bf16-openvino"
            raise UserError(
                f"model {source.name!r}: {runtime} executes variants, and this is a checkpoint",
                f"make a variant: compress run recipes/{recipe}.yaml --model {source.name}",
            )
        kind = Kind(static=source.is_static, checkpoint=True)
        if runtime in (None, AUTO, TORCH) and not kind.static:
            return TORCH
        return pick_runtime(runtime or AUTO, {}, device=device or "cpu", dtype=dtype, kind=kind)
    info = source.compressed
    wanted, kind = runtime or info.runtime, Kind(static=source.is_static)
    return pick_runtime(wanted, info.quantized, device=device or usual_device(wanted), dtype=dtype, kind=kind)


def preload(model: str, runtime: str | None = None, **_: object) -> None:
    """Import everything that loading this model would import, so that the load itself can be measured without imports.

    Raises:
        UserError: see `load`.
    """
    source = find(model)
    for one in [source] if source.routes is None else [source.along(way) for way in source.routes.ways]:
        name = runtime_of(one, runtime)
        importlib.import_module(RUNTIMES[name].opener)
        if RUNTIMES[name].cuda_only:
            importlib.import_module(RUNTIMES[name].package)
        if name == TORCH or RUNTIMES[name].cuda_only:
            from compress.runtimes.torch_runtime import import_architecture

            import_architecture(one)


def load(
    model: str | Path,
    *,
    runtime: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    compile: bool = False,
    stream: bool = False,
    batching: Batching = "auto",
) -> Embedder:
    """Load an embedder.

    Args:
        model: a built-in name (`nano`, `minilm`), the folder of a model, a variant or a run, a name on the hub, or `random:`
            followed by one of these; see `compress.models.source.find`.
        runtime: `torch`, `onnxruntime`, `openvino`, `gptq` (on a CUDA card) or, for static tables, `numpy`; or `auto` for the
            fastest one that is installed and supports the variant's number formats. Defaults to the runtime that the variant was
            made for and measured in, for a static table that is not a variant to numpy. Only `torch` and `gptq` need torch.
        device: `cpu`, `cuda`, `cuda:1`, ... Defaults to the GPU if there is one and the runtime is torch, else to the CPU.
        dtype: compute dtype: `float32`, `float16` or `bfloat16`. Defaults to the one that the variant was made for, else to float32
            on a CPU and float16 on a GPU.
        threads: number of CPU threads. Defaults to one per core. In torch the setting applies to the whole process.
        compile: whether to run the network through `torch.compile`, which needs a C++ compiler.
        stream: whether to stream the model instead of loading it: each call of `encode` reads it block by block, in the memory of
            one block.
        batching: how texts share a batch. `packed` puts them end to end, `padded` fills them up to one length, `auto` packs on a
            CUDA card where the network can be packed. The vectors are the same up to rounding; the torch embedder's `batching`
            says which it is.

    Raises:
        UserError: the model does not exist, this version does not run its kind, the runtime does not execute it, or it cannot be
            packed and `batching` is `packed`.
        ValueError: `compile` and `stream` are both set. Compiling needs the whole network, which streaming never holds.
    """
    how: dict[str, Any] = {"runtime": runtime, "device": device, "dtype": dtype, "threads": threads}
    return open_source(find(model), **how, compile=compile, stream=stream, batching=batching)


def _check_fits(source: ModelFolder, dtype: str | None) -> None:
    """Check that a model fits in memory. Without this check the operating system may kill the process.

    Raises:
        UserError: it does not fit.
    """
    shape = source.shape
    needed = shape.bytes if source.is_variant else shape.parameters * DTYPE_BYTES[dtype or "float32"]
    free = available_memory_bytes()
    if needed > free:
        raise UserError(
            f"model {source.name!r}: takes {gigabytes(needed)} of memory in {dtype or 'float32'}, {gigabytes(free)} are free",
            "stream it block by block with --stream (stream=True in Python), or use a smaller dtype",
        )


def open_source(
    source: ModelFolder,
    *,
    runtime: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    compile: bool = False,
    stream: bool = False,
    batching: Batching = "auto",
) -> Embedder:
    """Load the embedder of a model whose folder was found; see `load`."""
    if source.routes is not None:
        how: dict[str, Any] = {"runtime": runtime, "device": device, "dtype": dtype, "threads": threads}
        return _open_routes(source, source.routes, **how, compile=compile, stream=stream, batching=batching)
    if batching not in get_args(Batching):
        raise UserError(f"batching {batching!r} is not known", nearest(batching, get_args(Batching)))
    info = source.variant
    if info is None and (compile or stream):
        runtime = runtime or TORCH  # only torch does either, and a static table would open in numpy
    name = runtime_of(source, runtime, device=device, dtype=dtype)
    if info is not None and dtype is None:
        dtype = info.dtype if name == info.runtime else None
    if name != TORCH:
        if compile or stream:
            raise UserError(f"model {source.name!r}: only torch compiles or streams, and this one runs in {name}", "runtime: torch")
        opener = importlib.import_module(RUNTIMES[name].opener).open_variant
        on_card: Embedder
        if RUNTIMES[name].cuda_only:
            on_card = opener(source, dtype=dtype, threads=threads, device=device, batching=batching)
            return on_card
        if batching == PACKED:
            raise UserError(f"model {source.name!r}: only torch runs packed batches, and this one runs in {name}", "runtime: torch")
        _check_fits(source, dtype)
        embedder: Embedder = opener(source, dtype=dtype, threads=threads)
        return embedder
    if stream and batching == PACKED:
        raise UserError(f"model {source.name!r}: a streamed model runs padded batches", "batching: padded")
    return _open_in_torch(source, device, dtype, threads, compile, stream, batching)


def _open_routes(source: ModelFolder, routes: Routes, **how: Any) -> RoutedEmbedder:
    """Open the embedder of each route of a Router; `how`: as `open_source`. Routes that run one Transformer share its weights."""
    opened: dict[tuple[Module, ...], Embedder] = {}
    networks: dict[Path, Embedder] = {}
    for way in routes.ways:
        route, place = source.along(way), way[0].folder
        if place in networks:
            opened[way] = _sharing(route, networks[place], how["compile"], how["batching"])
            continue
        opened[way] = open_source(route, **how)
        if way[0].kind == TRANSFORMER and not how["stream"] and route.own_architecture is None:
            networks[place] = opened[way]
    return RoutedEmbedder(source.name, routes, opened)


def _sharing(route: ModelFolder, other: Embedder, compile: bool, batching: Batching) -> Embedder:
    """Open a route whose Transformer the embedder of another one holds."""
    from compress.runtimes.torch_embedder import TorchEmbedder
    from compress.runtimes.torch_runtime import open_sharing

    assert isinstance(other, TorchEmbedder), "a checkpoint that is not streamed runs in torch alone"
    embedder = open_sharing(route, other, batching=batching)
    if compile:
        embedder.compile()
    return embedder


def _open_in_torch(
    source: ModelFolder,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    compile: bool,
    stream: bool,
    batching: Batching,
) -> Embedder:
    from compress.runtimes import torch_runtime

    if threads is not None:
        torch_runtime.use_threads(threads)
    if not stream and torch_runtime.pick_device(device).type == "cpu":
        _check_fits(source, dtype)
    if stream:
        if compile:
            raise ValueError("compile and stream exclude each other")
        return torch_runtime.open_streamed(source, device=device, dtype=dtype)
    opener = torch_runtime.open_variant if source.is_variant else torch_runtime.open_checkpoint
    embedder = opener(source, device=device, dtype=dtype, batching=batching)
    if compile:
        embedder.compile()
    return embedder
