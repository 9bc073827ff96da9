"""The torch runtime: opens checkpoints and variants as embedders, whole or streamed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from compress.errors import UserError
from compress.layers.compressed import CompressedLayer, CompressedLinear
from compress.layers.empty import empty_layer
from compress.layers.float_layers import CastEmbedding, OneDnnLinear, has_onednn_linear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.models.checkpoint import weight_files
from compress.models.network import empty_network, load_network, read_config
from compress.models.nv_embed import NVEmbedder, NVEmbedNetwork, is_nv_embed, read_nv_spec
from compress.models.opened import OpenModel
from compress.models.segments import blocks_of
from compress.models.spec import EmbedderSpec, read_json, read_spec, transformer_folder
from compress.models.surgery import drop_sublayer, keep_heads
from compress.models.tokens import TextTokenizer, open_tokenizer
from compress.models.torch_embedder import TorchEmbedder
from compress.models.variant import VariantInfo, is_variant
from compress.models.weights import Weights
from compress.runtimes.allocator import keep_freed_memory
from compress.runtimes.streamed import StreamedEmbedder
from compress.walk import Streamed

LONGEST = 2**31 - 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str | None) -> torch.device:
    """Return the named device, or the GPU where there is one, else the CPU.

    Raises:
        UserError: the named device is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r}: this torch ({torch.__version__}) sees no GPU")
    return torch.device(device)


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """Return the named compute dtype; by default half precision on a GPU and float32 on a CPU, where half is slow."""
    return DTYPES[dtype or ("float32" if device.type == "cpu" else "float16")]


def use_threads(threads: int) -> None:
    """Let torch compute with so many CPU threads, in the whole process."""
    torch.set_num_threads(threads)


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Put a network into the form that runs: on its device, floating tensors cast, weights packed for their kernels.

    Embedding tables stored in half precision stay so, and are cast after the lookup: for a MiniLM they are half of all weights.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device)
    for path in [path for path, _ in model.named_modules()]:  # by name: a list of modules would keep what is replaced alive
        module = model.get_submodule(path)
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedEmbedding):
                child.dtype = dtype
            elif isinstance(child, CompressedLayer):
                child.pack()
            elif type(child) is nn.Embedding and child.weight.dtype != dtype:
                setattr(module, name, CastEmbedding(child, dtype))
            elif type(child) is nn.Linear and device.type == "cpu" and has_onednn_linear(dtype):
                setattr(module, name, OneDnnLinear(child, dtype))
    for module in model.modules():
        if isinstance(module, CompressedLayer | CastEmbedding):
            continue  # scales stay in float32, tables as they are stored
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return model


def import_architecture(folder: Path) -> None:
    """Import the code of a model's architecture, which transformers otherwise does while loading it."""
    from transformers import AutoModel

    AutoModel._model_mapping[type(read_config(transformer_folder(folder)))]


def _kind(model: nn.Module) -> type[TorchEmbedder]:
    return NVEmbedder if isinstance(model, NVEmbedNetwork) else TorchEmbedder


def _embedder(
    name: str, spec: EmbedderSpec, tokenizer: TextTokenizer, model: nn.Module, device: torch.device, dtype: torch.dtype
) -> TorchEmbedder:
    return _kind(model)(name, spec, tokenizer, prepare(model, dtype, device), device, dtype)


def read_text_side(folder: Path) -> tuple[EmbedderSpec, TextTokenizer]:
    """Read how a model's or a variant's embedder takes texts: its spec, and its tokenizer as transformers sets it up.

    The longest input is what the folder's settings say, else what both the tokenizer and the network's positions allow, as in
    sentence-transformers.

    Raises:
        UserError: there is no tokenizer, or only one without a Rust implementation.
    """
    from transformers import AutoTokenizer

    if is_variant(folder):
        info = VariantInfo.read(folder)
        return info.spec, info.tokenizer(folder)
    if is_nv_embed(folder):
        spec = read_nv_spec(folder)
        # Its tokenizer.json as it stands: that is what the original loads, and it needs nothing from a hub.
        return spec, TextTokenizer(open_tokenizer(folder), spec.max_length or LONGEST, spec)
    spec, inner = read_spec(folder), transformer_folder(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(inner, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{inner}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{inner}: {type(tokenizer).__name__} has no Rust tokenizer (tokenizer.json)")
    positions = getattr(read_config(inner), "max_position_embeddings", None) or LONGEST
    longest = spec.max_length or min(int(tokenizer.model_max_length), positions, LONGEST)
    return spec, TextTokenizer(backend, longest, spec)


def open_checkpoint(folder: Path, name: str, *, device: str | None = None, dtype: str | None = None) -> TorchEmbedder:
    """Open a sentence-transformers or transformers folder as an embedder."""
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    spec, tokenizer = read_text_side(folder)
    return _embedder(name, spec, tokenizer, load_network(transformer_folder(folder), compute), target, compute)


def empty_model(folder: Path) -> nn.Module:
    """Build the network of a model's or a variant's folder, its parameters without values."""
    if not is_variant(folder):
        return empty_network(transformer_folder(folder))
    info = VariantInfo.read(folder)
    model = empty_network(folder, info.folded)
    if info.heads is not None:
        keep_heads(model, info.heads)
    for number, sublayer in info.dropped:
        drop_sublayer(blocks_of(model)[1][number], sublayer)
    for name, layer in info.quantized.items():
        model.set_submodule(name, empty_layer(model.get_submodule(name), layer))
    return model


def buffers_to(model: nn.Module, device: torch.device) -> None:
    """Move what no file holds, such as rotary frequencies, to a device; parameters without values stay without."""
    for module in model.modules():
        for buffer, tensor in module.named_buffers(recurse=False):
            if not tensor.is_meta:
                setattr(module, buffer, tensor.to(device))


def weights_of(folder: Path, model: nn.Module) -> Weights:
    """Open the weights of a model's or a variant's folder for `empty_model`'s network; none is read yet."""
    exact = is_variant(folder) or is_nv_embed(folder)
    return Weights(weight_files(transformer_folder(folder)), model, exact=exact)


def open_model(folder: Path) -> OpenModel:
    """Open a checkpoint, or a variant that is not finished, to be made smaller; no weight is read yet."""
    network = empty_model(folder)
    config = read_json(transformer_folder(folder) / "config.json")
    opened = OpenModel(
        network, weights_of(folder, network), *read_text_side(folder), config, tuple(range(len(blocks_of(network)[1])))
    )
    if not is_variant(folder):
        return opened
    info = VariantInfo.read(folder)
    return replace(opened, layers=info.layers or opened.layers, heads=info.heads, dropped=info.dropped)


def open_variant(
    folder: Path, name: str, *, device: str | None = None, dtype: str | None = None, activations: bool = True
) -> TorchEmbedder:
    """Open a variant as it was saved: quantized weights go from the file to their kernels, never through floating point.

    `activations`: False leaves them in floating point whatever the variant's scheme is, as libraries do that unpack its weights.
    """
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    model = empty_model(folder)
    weights_of(folder, model).fill(model)
    if not activations:
        for path, module in list(model.named_modules()):
            if isinstance(module, CompressedLinear) and module.rounds_inputs:
                model.set_submodule(path, module.plain().requires_grad_(False))
    return _embedder(name, *read_text_side(folder), model, target, compute)


def open_streamed(folder: Path, name: str, *, device: str | None = None, dtype: str | None = None) -> StreamedEmbedder:
    """Open a model or a variant without loading it: its blocks are read one after another each time texts are encoded."""
    target = pick_device(device)
    compute = pick_dtype(dtype, target)
    model = empty_model(folder)
    buffers_to(model, target)
    source = Streamed(model, weights_of(folder, model), partial(prepare, dtype=compute, device=target))
    return StreamedEmbedder(_kind(model)(name, *read_text_side(folder), model, target, compute), source)
