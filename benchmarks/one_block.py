"""GPTQ or SparseGPT on one block of a large model: ours and other libraries', each in its own process and environment.

    python benchmarks/one_block.py
    python benchmarks/one_block.py --method sparsegpt --pattern 2:4
    python benchmarks/one_block.py --hidden 512 --mlp 1792 --heads 8 --kv-heads 2 --texts 16

One block in Mistral-7B's shape, random weights, the same calibration tokens in the same batches, damping 0.01, computed in the
dtype that ours chooses for the processor. All learn from one pass in which every layer of the block is seen as it was (optimum's
`true_sequential` is off: it would take seven passes).

GPTQ: 4 bits, symmetric, groups of 128. All take channels in falling order of their second moment and leave groups in place: ours
and llm-compressor by static groups, optimum by `act_group_aware`, which is what it has of the kind; its `desc_act` would move
groups. SparseGPT: half of the weights, by `--pattern`; ours and llm-compressor's.

Seconds: from token ids to the quantized block, the pass of the texts through the result included. Ours hold reading the block
and writing it; optimum's hold packing it; llm-compressor's hold neither. What is imported or compiled once is not in them: a small
block goes before. Memory: the anonymous resident set before the block is loaded, and at its peak. Error: |X (W-Q)^T|^2 / |X W^T|^2
of each layer, X being what the unquantized block gives it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from compress.models.folder import ModelFolder

# Peers run this file too, in environments that hold none of our packages: nothing but the standard library is imported up here.
OPTIMUM = ["optimum==2.3.*", "gptqmodel==7.6.*", "numpy==2.2.6"]
LLM_COMPRESSOR = ["llmcompressor==0.14.*", "transformers>=5.15,<5.18"]
PEERS = {"optimum": OPTIMUM, "llm-compressor": LLM_COMPRESSOR}
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY, BATCH_TOKENS, DAMPING = 8_192, 2_048, 0.01


class Peak:
    """Peak of the anonymous resident set in bytes, tracked in a thread."""

    def __init__(self) -> None:
        self.start = self.bytes = self._now()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _now() -> int:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
        return 1024 * int(found.group(1)) if found else 0

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._now())
            time.sleep(0.002)


def with_half_scales(weight: Any, scale: Any, group: int) -> Any:
    """Return a float32 weight [out, in] on the grid of its scales [out, groups], rounded to 16 bits."""
    wide = scale.float().repeat_interleave(group, dim=1)
    stored = scale if scale.dtype.itemsize == 2 else scale.half()
    return (weight.float() / wide).round_().mul_(stored.float().repeat_interleave(group, dim=1)).contiguous()


def with_optimum(
    model: Any, batches: list[Any], blocks: str, bits: int, group: int, *, damping: float = 0.1, sequential: bool = True
) -> dict[str, Any]:
    """Quantize a model in memory by `optimum.gptq.GPTQQuantizer`, with its defaults unless told otherwise.

    Args:
        model: a transformers model.
        batches: token ids without padding, int64 [texts, length].
        blocks: name of its list of blocks.
        bits: of a weight.
        group: inputs that share a scale.
        damping: share of the second moment's mean that is added to its diagonal.
        sequential: a pass over the texts for each layer, instead of one for all layers of a block.

    Returns:
        A function for each layer that gives its quantized weight, float32 [out, in].
    """
    import torch
    from optimum.gptq import GPTQQuantizer

    dataset = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in batches]
    quantizer = GPTQQuantizer(
        bits, dataset, group, damping, desc_act=False, act_group_aware=True, true_sequential=sequential,
        block_name_to_quantize=blocks, backend="torch",
    )  # fmt: skip
    quantizer.quantize_model(model)

    def weight(layer: Any) -> Any:
        return with_half_scales(layer.dequantize_weight().t(), layer.scales.t(), group)

    return {name: (lambda layer=module: weight(layer)) for name, module in model.named_modules() if hasattr(module, "qweight")}


def with_llm_compressor(
    model: Any, batches: list[Any], block: str, bits: int, group: int, *, damping: float = 0.01, causal: bool = False
) -> dict[str, Any]:
    """Quantize a model in memory by llm-compressor's `oneshot` with a `GPTQModifier`; see `with_optimum`.

    `block` is the class name of its blocks, by which the sequential pipeline cuts it. Batches without padding are calibrated
    without a mask, `causal` or not: version 0.14 builds masks by a config that no longer says that attention is eager. A
    `causal` model is therefore given its mask in four dimensions, which passes as it is.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    linears, ignored = _linears(model, block)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "actorder": "static"}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=ignored, dampening_frac=damping
    )
    _oneshot(model, recipe, batches, block, causal)

    def weight(layer: Any) -> Any:
        return with_half_scales(layer.weight, layer.weight_scale, group)

    return {name: (lambda layer=module: weight(layer)) for name, module in linears.items() if hasattr(module, "weight_scale")}


def with_sparsegpt(model: Any, batches: list[Any], block: str, pattern: str, *, damping: float = 0.01) -> dict[str, Any]:
    """Prune half of a causal model's weights in memory by llm-compressor's `SparseGPTModifier`; see `with_llm_compressor`."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    linears, ignored = _linears(model, block)
    structure = "0:0" if pattern == "unstructured" else pattern
    recipe = SparseGPTModifier(sparsity=0.5, mask_structure=structure, targets=["Linear"], ignore=ignored, dampening_frac=damping)
    _oneshot(model, recipe, batches, block, causal=True)
    return {name: (lambda layer=module: layer.weight.detach().float()) for name, module in linears.items() if name not in ignored}


def _linears(model: Any, block: str) -> tuple[dict[str, Any], list[str]]:
    """Return a model's linear layers, and the names of those that lie outside of its blocks."""
    import torch

    inside = {id(part) for module in model.modules() if type(module).__name__ == block for part in module.modules()}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return linears, [name for name, module in linears.items() if id(module) not in inside]


def _oneshot(model: Any, recipe: Any, batches: list[Any], block: str, causal: bool) -> None:
    """Run a recipe of llm-compressor, block by block."""
    import torch
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    def mask(ids: Any) -> Any:
        if not causal:
            return torch.ones_like(ids)
        length = ids.shape[1]
        future = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype).triu(1)
        return future.expand(len(ids), 1, length, length)

    data = DataLoader([{"input_ids": ids, "attention_mask": mask(ids)} for ids in batches], batch_size=None)
    oneshot(model=model, recipe=recipe, dataset=data, pipeline="sequential", sequential_targets=[block])


def by_peer(arguments: argparse.Namespace, folder: Path) -> tuple[float, dict[str, Any]]:
    """Quantize a checkpoint with a peer; return the seconds and a function that returns the weight of a layer."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    batches = list(load_file(folder / "ids.safetensors")["ids"].split(batch_rows(arguments)))
    start = time.perf_counter()
    if arguments.worker == "optimum":
        found = with_optimum(model, batches, "layers", arguments.bits, arguments.group, damping=DAMPING, sequential=False)
    elif arguments.method == "sparsegpt":
        found = with_sparsegpt(model, batches, type(model.layers[0]).__name__, arguments.pattern, damping=DAMPING)
    else:
        block = type(model.layers[0]).__name__
        found = with_llm_compressor(model, batches, block, arguments.bits, arguments.group, damping=DAMPING, causal=True)
    return time.perf_counter() - start, found


def by_us(arguments: argparse.Namespace, folder: Path) -> tuple[float, dict[str, Any]]:
    """Quantize a checkpoint with `compress.pipeline.apply.make_variant`; return the same as for a peer."""
    import numpy as np
    import torch
    from safetensors.torch import load_file

    from compress.calibration.texts import CalibrationSource, CalibrationTexts
    from compress.common.journal import Journal
    from compress.layers.quantized_linear import QuantizedLinear
    from compress.methods.prune.sparsegpt import SparseGPT
    from compress.methods.quantize.gptq import GPTQ
    from compress.models.network.walk import Streamed, walk
    from compress.models.opened import empty_model, weights_of
    from compress.models.source import find
    from compress.pipeline.apply import make_variant
    from compress.pipeline.stage import BuildOptions

    class Ids(CalibrationSource):
        def batches(self, *_: Any) -> CalibrationTexts:
            batches = [(ids.numpy(), np.ones(ids.shape, dtype=np.int64)) for ids in all_ids.split(batch_rows(arguments))]
            return CalibrationTexts(batches, [mask for _, mask in batches])

    class Times(Journal):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.at: dict[str, float] = {}

        def put(self, key: str, value: dict[str, Any]) -> None:
            super().put(key, value)
            self.at[key] = time.perf_counter()

    all_ids = load_file(folder / "ids.safetensors")["ids"]
    journal, variant = Times(folder / "journal"), folder / "variant"
    journal.folder.mkdir()
    method: Any = GPTQ(bits=arguments.bits, group_size=arguments.group, damping=DAMPING)
    if arguments.method == "sparsegpt":
        method = SparseGPT(pattern=arguments.pattern, damping=DAMPING)
    texts = Ids([""] * len(all_ids), (), all_ids.shape[1])
    options = BuildOptions("0", lambda _: None, calibration=texts)
    make_variant(find(str(folder)), ModelFolder("block", folder).shape, [method], variant, journal, options)
    # From where the embeddings are written to where the norm behind the block is: the texts have passed the block by then.
    seconds = journal.at["segment 2"] - journal.at["segment 0"]

    found: dict[str, Any] = {}

    def collect(_: int, __: Any, parts: Any) -> None:
        for path, part in parts.items():
            for name, module in part.named_modules():
                if isinstance(module, QuantizedLinear):
                    found[f"{path}.{name}"] = module.dequantized
                elif isinstance(module, torch.nn.Linear):
                    found[f"{path}.{name}"] = lambda layer=module: layer.weight.detach().float()

    network = empty_model(ModelFolder("", variant))
    walk(Streamed(network, weights_of(ModelFolder("", variant), network)), collect)
    return seconds, found


def work(arguments: argparse.Namespace) -> None:
    """Run one tool: first on a small block, for imports and one-time compilation, then on the block itself."""
    from safetensors.torch import save_file

    quantize = by_peer if arguments.worker in PEERS else by_us
    folder = arguments.folder
    quantize(arguments, folder / f"small-{arguments.worker}")
    peak = Peak()
    seconds, found = quantize(arguments, folder)
    took = {"seconds": seconds, "before": peak.start, "peak": peak.bytes}
    (folder / f"{arguments.worker}.json").write_text(json.dumps(took), encoding="utf-8")
    save_file({name.rpartition(".")[2]: weight() for name, weight in found.items()}, folder / f"{arguments.worker}.safetensors")


def batch_rows(arguments: argparse.Namespace) -> int:
    return max(1, BATCH_TOKENS // arguments.tokens)


def write_checkpoint(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the block as a model of one layer, bfloat16, an unused tokenizer, and the token ids."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import MistralConfig, MistralModel, PreTrainedTokenizerFast

    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=arguments.hidden, intermediate_size=arguments.mlp, num_hidden_layers=1,
        num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads, head_dim=arguments.hidden // arguments.heads,
        sliding_window=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = MistralModel(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(arguments.seed)
    state = {}
    for name, tensor in model.state_dict().items():
        std = 1.0 if "embed" in name else tensor.shape[-1] ** -0.5
        made = torch.ones(tensor.shape) if tensor.dim() == 1 else torch.empty(tensor.shape).normal_(0, std, generator=generator)
        state[name] = made.to(torch.bfloat16)
    model.save_pretrained(folder, state_dict=state)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))).save_pretrained(folder)
    ids = torch.randint(VOCABULARY, (arguments.texts, arguments.tokens), generator=generator)
    save_file({"ids": ids}, folder / "ids.safetensors")


def errors(arguments: argparse.Namespace, folder: Path) -> dict[str, dict[str, float]]:
    """Return the error of each layer for each tool, from the second moments of the unquantized block's inputs."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel

    from compress.calibration.statistics import Hessian
    from compress.layers.float_layers import linear

    model = AutoModel.from_pretrained(folder, dtype=getattr(torch, arguments.dtype))
    linears = {name.rpartition(".")[2]: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    leaders = {"q_proj": LAYERS[:3], "o_proj": LAYERS[3:4], "gate_proj": LAYERS[4:6], "down_proj": LAYERS[6:]}
    moments = {name: Hessian(linears[name].in_features, torch.device("cpu")) for name in leaders}
    ones = torch.ones(batch_rows(arguments) * arguments.tokens)
    for name, moment in moments.items():
        linears[name].register_forward_pre_hook(
            lambda _, given, moment=moment: moment.add(given[0].flatten(0, 1), ones[: given[0][..., 0].numel()])
        )
    with torch.no_grad():
        for ids in load_file(folder / "ids.safetensors")["ids"].split(batch_rows(arguments)):
            model(input_ids=ids)
    found: dict[str, dict[str, float]] = {}
    stored = {path.stem: load_file(path) for path in (folder / f"{tool}.safetensors" for tool in ("ours", *PEERS)) if path.exists()}
    for leader, names in leaders.items():
        moment = moments.pop(leader).mean()
        for name in names:
            weight = linears[name].weight.detach().float()
            whole = float((linear(weight, moment) * weight).sum())
            for tool, quantized in stored.items():
                lost = weight - quantized[name]
                found.setdefault(tool, {})[name] = float((linear(lost, moment) * lost).sum()) / whole
    return found


def peer_environment() -> dict[str, str]:
    """Return the environment variables of a peer's process."""
    left_out = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # By default gptqmodel gives a process half of the cores.
    workers = {"GPTQMODEL_CPU_WORKERS": str(max(2, os.cpu_count() or 1))}
    return {key: value for key, value in os.environ.items() if key not in left_out} | offline | workers


def compare(arguments: argparse.Namespace) -> None:
    """Write the checkpoint, run each tool on it, print."""
    import torch
    from environments import python_of

    from compress.layers.float_layers import has_onednn_linear

    # As `compress.pipeline.apply` chooses for a checkpoint in bfloat16.
    arguments.dtype = "bfloat16" if has_onednn_linear(torch.bfloat16) else "float32"
    every = "ours,optimum,llm-compressor" if arguments.method == "gptq" else "ours,llm-compressor"
    tools = (arguments.tools or every).split(",")
    pythons = {
        tool: python_of(tool, PEERS[tool], arguments.environments) if tool in PEERS else Path(sys.executable) for tool in tools
    }
    with tempfile.TemporaryDirectory(dir=arguments.work) as temporary:
        folder = Path(temporary).resolve()
        write_checkpoint(arguments, folder)
        small = {"hidden": 2 * arguments.group, "mlp": 2 * arguments.group, "heads": 2, "kv_heads": 2, "texts": 8}
        for tool in tools:
            write_checkpoint(argparse.Namespace(**vars(arguments) | small), folder / f"small-{tool}")
        given = {"folder": folder} | {
            key: getattr(arguments, key) for key in ("dtype", "method", "pattern", "bits", "group", "tokens")
        }
        options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
        print(f"{arguments.method}, {arguments.dtype}, {arguments.texts} texts of {arguments.tokens} tokens")
        print(f"{'':16}seconds    before MB   peak MB")
        for tool in tools:
            environment = peer_environment() if tool in PEERS else dict(os.environ)
            command = [str(pythons[tool]), str(Path(__file__).resolve()), "--worker", tool, *options]
            done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                print(f"{tool:16}failed:\n{done.stderr[-3000:]}", flush=True)
                continue
            took = json.loads((folder / f"{tool}.json").read_text(encoding="utf-8"))
            print(f"{tool:16}{took['seconds']:7.1f}{took['before'] / 1e6:13,.0f}{took['peak'] / 1e6:10,.0f}", flush=True)
        print(f"\n{'relative error':16}" + "".join(f"{name:>11}" for name in LAYERS))
        for tool, layers in errors(arguments, folder).items():
            print(f"{tool:16}" + "".join(f"{layers[name]:11.5f}" for name in LAYERS))


def main() -> None:
    """Compare the tools; or, as a subprocess, run one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256, help="tokens per text")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("gptq", "sparsegpt"), default="gptq")
    parser.add_argument("--pattern", choices=("unstructured", "2:4", "4:8"), default="unstructured", help="pattern of zeros")
    parser.add_argument("--tools", help="defaults to all that have the method: ours,optimum,llm-compressor")
    parser.add_argument("--work", type=Path, help="folder for the checkpoint; defaults to the system's temporary folder")
    for own in ("--worker", "--folder", "--dtype"):
        parser.add_argument(own, type=Path if own == "--folder" else str, help=argparse.SUPPRESS)
    if "--worker" not in sys.argv:
        from environments import add_environments_option

        add_environments_option(parser)
    arguments = parser.parse_args()
    if arguments.worker is None:
        compare(arguments)
    else:
        work(arguments)


if __name__ == "__main__":
    main()
