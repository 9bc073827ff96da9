"""NV-Embed-v2 at full size on a GPU, random weights: the published implementation against ours.

    python benchmarks/gpu_nv_embed.py                                   # 7.85 B in float16: some 35 GB of GPU memory
    python benchmarks/gpu_nv_embed.py --quantized int8,fp8,nf4,llm-int8 # these besides, our blocks quantized: 25 GB more

The published way: eager attention, every padded token through the head, keys and values of the latents anew for every text.
Ours: fused attention, folded head. Texts of a batch are equally long, so padding plays no part. Memory is what the whole process
holds at its peak, all ways' weights among it; a way's own weights stand beside its name.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from nv_head import folded_twin
from nv_original import OriginalStyle
from torch import nn

from compress.layers.compressed import CompressedLayer
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.base import Method
from compress.methods.quantize.bitsandbytes import BitsAndBytes
from compress.methods.quantize.fp8 import FP8
from compress.methods.quantize.rtn import RTN
from compress.models.folder import ModelFolder
from compress.models.network.build import empty_network
from compress.models.network.nv_embed import NVEmbedNetwork
from compress.models.random_weights import random_std
from compress.models.shape import known_config

MODEL = "nvidia/NV-Embed-v2"
LENGTHS = (32, 128, 512)
LARGE = 8192


def random_network(overrides: dict[str, int], device: torch.device, dtype: torch.dtype) -> NVEmbedNetwork:
    """Build the network with random weights, sampled on the device."""
    config = known_config(MODEL)
    assert config is not None
    config["text_config"] |= overrides
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        network = empty_network(ModelFolder("", Path(folder)))
    assert isinstance(network, NVEmbedNetwork)
    blocks = config["text_config"]["num_hidden_layers"]
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in list(network.named_parameters()):
        std = random_std(name, tuple(parameter.shape), blocks)
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        value = value.fill_(0.0 if name.endswith("bias") else 1.0) if std is None else value.normal_(0, std, generator=generator)
        owner, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    return network.to(device).eval()


def seconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Time a call until the device has finished it."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def matrix_peak(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Measure operations per second of a large square product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = [seconds(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * size**3 / median(times)


METHODS: dict[str, Method] = {
    "int8": RTN(),
    "fp8": FP8(),
    "nf4": BitsAndBytes(format="nf4"),
    "llm-int8": BitsAndBytes(format="llm-int8"),
}


def quantized_twin(network: NVEmbedNetwork, step: Method, device: torch.device) -> NVEmbedNetwork:
    """Return the network with its blocks quantized one by one; modules outside of blocks are shared."""
    twin = copy.copy(network)
    twin._modules = dict(network._modules)
    twin.embedding_model = copy.copy(network.embedding_model)
    twin.embedding_model._modules = dict(network.embedding_model._modules)
    blocks = nn.ModuleList()
    for index, block in enumerate(network.embedding_model.layers):
        made = copy.deepcopy(block)
        step.apply({f"layers.{index}": made})
        for module in made.modules():
            if isinstance(module, CompressedLayer):
                module.pack()
        blocks.append(made.to(device))
    twin.embedding_model.layers = blocks
    return twin


def weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers; int8 weights that a kernel has packed count by their size."""
    plain = sum(tensor.numel() * tensor.element_size() for tensor in (*network.parameters(), *network.buffers()))
    packed = (m for m in network.modules() if isinstance(m, QuantizedLinear) and m.weight is None)
    return plain + sum(layer.in_features * layer.out_features for layer in packed)


def main() -> None:
    """Measure both in turn at each length and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens per batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantized", default="", metavar="A,B", help=f"methods to time, out of {', '.join(METHODS)}")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    peak = matrix_peak(device, dtype, LARGE if device.type == "cuda" else 1024)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {dtype}: {peak / 1e12:,.1f} TFLOP/s in a square product")
    published = random_network({"num_hidden_layers": arguments.layers}, device, dtype)
    ours = folded_twin(published)
    ours.latent_attention_model.to(dtype)
    ways: dict[str, tuple[nn.Module, str]] = {"published": (OriginalStyle(published), "eager"), "ours": (ours, "sdpa")}
    for name in filter(None, arguments.quantized.split(",")):
        ways[name] = (quantized_twin(ours, METHODS[name], device), "sdpa")
    for way, (network, _) in ways.items():
        print(f"{way}: {weight_bytes(network) / 1e9:.2f} GB of weights")
    linear = 2 * sum(parameter.numel() for parameter in ours.embedding_model.layers.parameters())
    print(f"{'tokens':>7}{'':>11}{'texts/s':>10}{'vs published':>14}{'vs ours':>10}{'GB at peak':>12}{'of the peak rate':>18}")
    for length in LENGTHS:
        texts = max(1, arguments.tokens // length)
        ids = torch.randint(3, 30_000, (texts, length), device=device)
        mask = torch.ones_like(ids)
        times: dict[str, list[float]] = {way: [] for way in ways}
        memory: dict[str, float] = {}
        with torch.inference_mode():
            for turn in range(arguments.rounds + 1):
                for way, (network, attention) in ways.items():
                    published.embedding_model.config._attn_implementation = attention  # one config for all ways
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    taken = seconds(partial(network, ids, mask, mask), device)
                    memory[way] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
                    if turn:
                        times[way].append(taken)
        hidden, blocks = 4096, arguments.layers
        useful = texts * length * (linear + 4 * length * hidden * blocks)
        for way in ways:
            ratios = [
                median(theirs / own for theirs, own in zip(times[other], times[way], strict=True))
                for other in ("published", "ours")
            ]
            rate = useful / median(times[way]) / peak
            print(
                f"{length:7}{way:>11}{texts / median(times[way]):10.1f}{ratios[0]:13.2f}x{ratios[1]:9.2f}x{memory[way]:12.1f}"
                f"{100 * rate:16.1f} %"
            )


if __name__ == "__main__":
    main()
