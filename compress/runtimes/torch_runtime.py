"""The torch runtime: opens checkpoints and variants as embedders, loaded or streamed."""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import nn

from compress.common.errors import UserError, nearest
from compress.layers.compressed import CompressedLayer, CompressedLinear
from compress.layers.float8_linear import has_float8_products
from compress.layers.float_layers import CastEmbedding, OneDnnLinear, has_onednn_linear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.scheme import ActivationScheme, Numbers
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network, sharing_network
from compress.models.network.pooling import Float32Linear, Float32Norm, LayerMean, head_of
from compress.models.network.walk import Streamed
from compress.models.opened import buffers_to, empty_model, weights_of
from compress.runtimes.allocator import keep_freed_memory
from compress.runtimes.contract import Batching
from compress.runtimes.merging import fuse, merge_products
from compress.runtimes.streamed import StreamedEmbedder
from compress.runtimes.torch_embedder import TorchEmbedder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str | None) -> torch.device:
    """Return the named device; by default the GPU if there is one, else the CPU.

    Raises:
        UserError: the device is a GPU, and torch finds none of its kind.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch ({torch.__version__}) sees no GPU")
    if device.startswith("mps") and not torch.backends.mps.is_available():
        raise UserError(f"device {device!r}: this torch ({torch.__version__}) sees no Apple GPU")
    return torch.device(device)


def check_device(folder: ModelFolder, device: torch.device) -> None:
    """Check that a device multiplies a variant's numbers, and say where it does so no faster than in floating point.

    Raises:
        UserError: the device is an Apple GPU, and the variant's layers round their inputs, or are in FP8, MXFP4, NVFP4 or
            bitsandbytes' formats. Floating point and integer weights alone run there.
    """
    quantized = folder.compressed.quantized
    if device.type == "mps":
        for name, layer in quantized.items():
            if layer.numbers is not Numbers.INTEGER or layer.activations is not ActivationScheme.NONE:
                raise UserError(
                    f"model {folder.name!r}: device 'mps' has no product of {layer.name} with activations {layer.activations} "
                    f"(layer {name})",
                    "use device 'cpu', or a variant of recipes/int8-weights.yaml",
                )
    eight = (layer for layer in quantized.values() if layer.numbers is Numbers.FLOAT8)
    rounds = any(layer.activations is not ActivationScheme.NONE for layer in eight)
    if rounds and device.type == "cuda" and not has_float8_products(device):
        major, minor = torch.cuda.get_device_capability(device)
        print(
            f"model {folder.name!r}: {torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no FP8 "
            "products: the same numbers are multiplied in the compute dtype, which is no faster than the original. "
            "This card has products of int8: recipes/int8.yaml",
            file=sys.stderr,
            flush=True,
        )


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the named compute dtype; by default float16 on a GPU and float32 on a CPU, where half precision is slow.

    Raises:
        UserError: it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known", nearest(dtype, DTYPES))
    return DTYPES[dtype or ("float32" if device.type == "cpu" else "float16")]


def use_threads(threads: int) -> None:
    """Set the number of CPU threads that torch computes with, in the whole process."""
    torch.set_num_threads(threads)


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device, *, merged: bool | None = None) -> nn.Module:
    """Convert a network in place to the form that runs: on its device, in its compute dtype, weights packed for their kernels.

    On a GPU, layers with the same input become one product, and norms and gated MLPs are fused where Triton is installed; `merged`
    asks for the same elsewhere, or for neither.

    The token table keeps the dtype in which it is stored, and rows are converted after the look-up: in a MiniLM it is half of all
    weights. Smaller tables are converted whole, because some networks multiply by them (DeBERTa's relative positions).
    """
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device)
    if merged is None:
        merged = device.type == "cuda"
    if merged:
        merge_products(model)
    tables = [module for module in model.modules() if type(module) is nn.Embedding]
    largest = max(tables, key=lambda table: table.num_embeddings, default=None)
    for path in [path for path, _ in model.named_modules()]:  # by name: a list of modules would keep replaced ones alive
        module = model.get_submodule(path)
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedEmbedding):
                child.dtype = dtype
            elif isinstance(child, CompressedLayer):
                child.pack()
            elif child is largest and child.weight.dtype != dtype:
                setattr(module, name, CastEmbedding(child, dtype))
            elif type(child) is nn.Linear and device.type == "cpu" and has_onednn_linear(dtype):
                setattr(module, name, OneDnnLinear(child, dtype))
    for module in model.modules():
        if isinstance(module, CompressedLayer | CastEmbedding | Float32Linear | Float32Norm | LayerMean):
            continue  # scales stay in float32, tables as they are stored
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    if merged:
        fuse(model, device, dtype)
    return model


def import_architecture(folder: ModelFolder) -> None:
    """Import the code of a model's architecture, which transformers otherwise imports during the load."""
    from transformers import AutoModel, PreTrainedConfig

    config = folder.network_config
    if isinstance(config, PreTrainedConfig):  # a static table has none of transformers'
        AutoModel._model_mapping[type(config)]


def open_checkpoint(
    folder: ModelFolder, *, device: str | None = None, dtype: str | None = None, batching: Batching = "padded"
) -> TorchEmbedder:
    """Open a sentence-transformers or transformers folder as an embedder; `batching`: see `TorchEmbedder`."""
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    return TorchEmbedder(folder, prepare(load_network(folder, compute), compute, target), target, compute, batching)


def open_sharing(folder: ModelFolder, other: TorchEmbedder, *, batching: Batching = "padded") -> TorchEmbedder:
    """Open a checkpoint whose Transformer module another embedder has loaded: the network is in memory once."""
    network = sharing_network(other.model, folder, other.dtype)
    head_of(network).to(other.device)
    return TorchEmbedder(folder, network, other.device, other.dtype, batching)


def open_variant(
    folder: ModelFolder,
    *,
    device: str | None = None,
    dtype: str | None = None,
    activations: bool = True,
    batching: Batching = "padded",
) -> TorchEmbedder:
    """Open a variant as it is stored: quantized weights go from the file to their kernels without conversion to floating point.

    Args:
        folder: the variant's folder.
        device: the device; see `pick_device`.
        dtype: the compute dtype; see `pick_dtype`.
        activations: whether to quantize activations as the variant says. False keeps them in floating point, like libraries that
            unpack the weights.
        batching: how texts share a batch; see `TorchEmbedder`.

    Raises:
        UserError: the device does not exist or does not multiply the variant's numbers, or the weights do not fit the network.
    """
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    if activations:
        check_device(folder, target)
    model = empty_model(folder)
    weights_of(folder, model).fill(model)
    if not activations:
        for path, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear) and module.rounds_inputs:
                model.set_submodule(path, module.plain().requires_grad_(False))
    return TorchEmbedder(folder, prepare(model, compute, target), target, compute, batching)


def open_streamed(folder: ModelFolder, *, device: str | None = None, dtype: str | None = None) -> StreamedEmbedder:
    """Open a model or a variant without loading it. Each call of `encode` reads its blocks one after another."""
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    if folder.is_variant:
        check_device(folder, target)
    model = empty_model(folder)
    buffers_to(model, target)
    source = Streamed(model, weights_of(folder, model), partial(prepare, dtype=compute, device=target))
    return StreamedEmbedder(TorchEmbedder(folder, model, target, compute), source)
