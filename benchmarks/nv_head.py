"""NV-Embed's published head against the folded one: floating-point operations and time, on the whole model.

python benchmarks/nv_head.py                    # 8 layers of the real width: 5 GB of disk, 11 GB of memory
python benchmarks/nv_head.py --layers 2 --rounds 5
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median

import torch
from nv_original import OriginalStyle
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.nv_embed import LatentAttention, NVEmbedNetwork, fold, mean_of_rows
from compress.models.source import find
from compress.models.text.nv_embed import latent_settings
from compress.runtimes.torch_runtime import pick_device, pick_dtype, prepare

LENGTHS = (16, 64, 256)


def folded_twin(network: NVEmbedNetwork) -> NVEmbedNetwork:
    """Return a network with the same backbone and the head folded."""
    assert isinstance(network.latent_attention_model, LatentAttention)
    twin = copy.copy(network)
    twin._modules = dict(network._modules)  # a shallow copy shares the table of its modules
    twin.latent_attention_model = fold(network.latent_attention_model)
    return twin


def operations(network: nn.Module, length: int) -> int:
    """Count the operations for a text of `length` tokens, on a network on the meta device."""
    ids = torch.ones((1, length), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if isinstance(network, OriginalStyle):
            network(ids, None, ids)
        else:  # which tokens are pooled cannot be read off a mask without values: all of them
            hidden = network.embedding_model(input_ids=ids).last_hidden_state
            network.latent_attention_model(hidden[0], mean_of_rows(torch.zeros_like(ids[0]), 1))
    return int(counter.get_total_flops())


def main() -> None:
    """Count, measure in turn, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--texts", type=int, default=1, help="texts per batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    dtype = pick_dtype(None, device)
    folder = find(f"random:nvidia/NV-Embed-v2,num_hidden_layers={arguments.layers}")
    with torch.device("meta"):
        settings = latent_settings(folder.config)
        empty = [NVEmbedNetwork(folder.network_config, settings, folded).eval() for folded in (False, True)]
    counted = [{length: operations(network, length) for length in LENGTHS} for network in (OriginalStyle(empty[0]), empty[1])]

    published = load_network(ModelFolder("", folder), torch.bfloat16)
    assert isinstance(published, NVEmbedNetwork)
    networks: list[nn.Module] = [OriginalStyle(published), folded_twin(published)]
    prepare(nn.ModuleList(networks), dtype, device)
    print(f"{arguments.layers} layers, {arguments.texts} text(s) a batch, {dtype}, {device}; medians of {arguments.rounds} rounds")
    print(f"{'tokens':>7}{'GFLOP':>9}{'folded':>9}{'promised':>10}{'seconds':>10}{'folded':>9}{'measured':>10}")
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        ids = torch.randint(3, 30_000, (arguments.texts, length), generator=generator).to(device)
        mask = torch.ones_like(ids)
        seconds: list[list[float]] = [[], []]
        with torch.inference_mode():
            vectors = [network(ids, mask, mask) for network in networks]
            assert float((vectors[0] * vectors[1]).sum(dim=1).min()) > 0.999
            for _ in range(arguments.rounds):
                for network, kept in zip(networks, seconds, strict=True):
                    start = time.perf_counter()
                    network(ids, mask, mask).cpu()
                    kept.append(time.perf_counter() - start)
        flops = [table[length] for table in counted]
        ratio = median(original / ours for original, ours in zip(*seconds, strict=True))
        print(
            f"{length:7}{flops[0] / 1e9:9.0f}{flops[1] / 1e9:9.0f}{flops[0] / flops[1]:9.2f}x"
            f"{median(seconds[0]):10.2f}{median(seconds[1]):9.2f}{ratio:9.2f}x"
        )


if __name__ == "__main__":
    main()
