"""The torch runtime: opens checkpoints and variants as embedders, and writes variants."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn

from compress.errors import UserError
from compress.layers.float_layers import CastEmbedding, OneDnnLinear, has_onednn_linear
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import ActivationScheme
from compress.models.checkpoint import atomic_folder
from compress.models.network import empty_network, fill_network, load_network
from compress.models.spec import EmbedderSpec, read_spec, transformer_folder
from compress.models.tokens import TextTokenizer
from compress.models.torch_embedder import TorchEmbedder
from compress.models.variant import WEIGHTS_FILE, VariantInfo

NAME = "torch"
SCHEMES = frozenset(ActivationScheme)
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


def prepare(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Put a network into the form that runs: on its device, floating tensors cast, weights packed for their kernels.

    Embedding tables stored in half precision stay so, and are cast after the lookup: for a MiniLM they are half of all weights.
    """
    model.to(device)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedLinear):
                child.pack()
            elif type(child) is nn.Embedding and child.weight.dtype != dtype:
                setattr(module, name, CastEmbedding(child, dtype))
            elif type(child) is nn.Linear and device.type == "cpu" and dtype == torch.float32 and has_onednn_linear():
                setattr(module, name, OneDnnLinear(child.float()))
    for module in model.modules():
        if isinstance(module, QuantizedLinear | CastEmbedding):
            continue  # scales stay in float32, tables as they are stored
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)
    return model


def open_network(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load the network of a sentence-transformers or transformers folder, unprepared: what methods work on."""
    return load_network(transformer_folder(folder), dtype)


def load_tokenizer(folder: Path, spec: EmbedderSpec) -> TextTokenizer:
    """Load a model folder's tokenizer, as transformers sets it up (its added tokens and templates included)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer that transformers can load ({str(error).splitlines()[0]})") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UserError(f"{folder}: {type(tokenizer).__name__} has no Rust tokenizer (tokenizer.json)")
    limit = min(int(tokenizer.model_max_length), 2**31 - 1)
    return TextTokenizer(backend, spec.max_length or limit, spec.lowercase)


def open_checkpoint(folder: Path, name: str, *, device: str | None = None, dtype: str | None = None) -> TorchEmbedder:
    """Open a sentence-transformers or transformers folder as an embedder."""
    spec, target = read_spec(folder), pick_device(device)
    compute = pick_dtype(dtype, target)
    model = open_network(folder, compute)
    # The same bound as sentence-transformers: what the settings say, else what tokenizer and positions allow.
    tokenizer = load_tokenizer(transformer_folder(folder), spec)
    positions = getattr(model.config, "max_position_embeddings", None)
    if spec.max_length is None and positions is not None and positions < tokenizer.max_length:
        tokenizer = load_tokenizer(transformer_folder(folder), spec.model_copy(update={"max_length": positions}))
    return TorchEmbedder(name, spec, tokenizer, prepare(model, compute, target), target, compute)


def save_variant(model: nn.Module, tokenizer: TextTokenizer, info: VariantInfo, source: Path, target: Path) -> None:
    """Write a variant's folder, whole or not at all.

    Floating-point tensors are stored in half precision, except the scales of quantized layers; one that float16 cannot hold is
    refused rather than turned into infinity.

    Raises:
        UserError: a weight is not finite in float16.
    """
    tensors = {}
    scales = {f"{name}.{part}" for name in info.quantized for part in ("weight_scale", "input_scale")}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name not in scales:
            tensor = tensor.to(torch.float16)
            if not torch.isfinite(tensor).all():
                raise UserError(f"{info.base}: {name} is not finite in float16; the variant was not written")
        tensors[name] = tensor.contiguous()
    with atomic_folder(target) as folder:
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        shutil.copy(transformer_folder(source) / "config.json", folder / "config.json")
        tokenizer.save(folder / "tokenizer.json")
        info.write(folder)


def open_variant(folder: Path, name: str, *, device: str | None = None, dtype: str | None = None) -> TorchEmbedder:
    """Open a variant as it was saved: quantized weights go from the file to their kernels, never through floating point."""
    info, target = VariantInfo.read(folder), pick_device(device)
    compute = pick_dtype(dtype, target)
    model = empty_network(folder)
    for layer, quantized in info.quantized.items():
        owner, _, attribute = layer.rpartition(".")
        linear = model.get_submodule(layer)
        assert isinstance(linear, nn.Linear)
        weight = torch.empty((linear.out_features, linear.in_features), dtype=torch.int8, device="meta")
        scale = torch.empty(linear.out_features, device="meta")
        static = quantized.activations is ActivationScheme.STATIC_PER_TENSOR
        input_scale = torch.empty((), device="meta") if static else None
        empty = QuantizedLinear(weight, scale, linear.bias, quantized.activations, input_scale)
        setattr(model.get_submodule(owner), attribute, empty)
    fill_network(model, folder / WEIGHTS_FILE)
    tokenizer = TextTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")), info.max_length, info.spec.lowercase)
    return TorchEmbedder(name, info.spec, tokenizer, prepare(model, compute, target), target, compute)
