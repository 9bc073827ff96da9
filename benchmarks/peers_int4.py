"""Accuracy at four bits, compared in pairs: our GPTQ run against optimum's GPTQ, llm-compressor's GPTQ and bitsandbytes' NF4.

    compress run RECIPE --model minilm                  # one step: gptq, bits 4, group_size 64
    python benchmarks/peers_int4.py --run results/<run>
    python benchmarks/peers_int4.py --run results/<run> --data FOLDER --tasks STSBenchmark,SciFact

The GPTQ peers quantize the run's base model, each in an environment of its own: the linear layers of the blocks, 4 bits, symmetric,
groups of 64, scales in half precision, as ours are stored. They calibrate on the run's own texts, batched by equal length, because
neither leaves padding out of its statistics. The rest is as each does it by default (optimum: a pass for each layer, damping 0.1,
`act_group_aware`; llm-compressor: static groups, damping 0.01). What they made is written with weights in float32 as an ordinary
folder under `--work`. NF4 is our own `bitsandbytes` method: blocks of 64, their scales in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Peers run this file too; see there.
from one_block import PEERS, peer_environment, with_llm_compressor, with_optimum

BITS, GROUP = 4, 64


def work(arguments: argparse.Namespace) -> None:
    """Run one peer: quantize the model and write the weights of its blocks."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    model = AutoModel.from_pretrained(arguments.model, dtype=torch.float32)
    batches = list(load_file(arguments.ids).values())
    name, blocks = next(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    if arguments.worker == "optimum":
        found = with_optimum(model, batches, name, BITS, GROUP)
    else:
        found = with_llm_compressor(model, batches, type(blocks[0]).__name__, BITS, GROUP)
    save_file({f"{name}.weight": weight() for name, weight in found.items()}, arguments.weights)


def equal_lengths(batches: Sequence[tuple[Any, Any]], rows: int = 32) -> dict[str, Any]:
    """Regroup padded token ids into batches without padding: int64 [at most `rows`, length] each."""
    import torch

    by_length: dict[int, list[Any]] = {}
    for ids, mask in batches:
        for one, count in zip(ids, mask.sum(axis=1), strict=True):
            by_length.setdefault(int(count), []).append(torch.from_numpy(one[:count].copy()))
    cut = [same[start : start + rows] for _, same in sorted(by_length.items()) for start in range(0, len(same), rows)]
    return {f"{number:04d}": torch.stack(texts) for number, texts in enumerate(cut)}


def check(run: Path) -> None:
    """Check that the run matches the peers: only linear layers of blocks are quantized, at the same bits."""
    from compress.layers.scheme import QuantizedLayer
    from compress.models.architectures import is_block_linear
    from compress.models.source import find

    wanted = QuantizedLayer(bits=BITS, group_size=GROUP, symmetric=True)
    for name, layer in find(str(run)).compressed.quantized.items():
        if layer != wanted or not is_block_linear(f"{name}.weight", 2):
            sys.exit(f"{run}: {name} is {layer.name}; the peers have {wanted.name} in the blocks' linear layers and nothing else")


def write_peers(run: Path, output: Path, environments: Path) -> dict[str, Path]:
    """Quantize the run's base with each peer on the run's texts; return the folders of the peers that succeeded."""
    from environments import python_of
    from safetensors.torch import load_file, save_file

    from compress.calibration.texts import CalibrationSource
    from compress.data.texts import texts_to_calibrate
    from compress.models.folder import ModelFolder
    from compress.models.source import find
    from compress.pipeline.recipe_file import read_recipe

    base = find(find(str(run)).compressed.base)
    recipe = read_recipe(run / "recipe.yaml")
    wanted = recipe.calibration
    texts = texts_to_calibrate(wanted.texts, wanted.count, recipe.seed)
    source = CalibrationSource(texts, None if wanted.prompts == "model" else wanted.prompts, wanted.max_tokens)
    output.mkdir(parents=True, exist_ok=True)
    ids = output / "ids.safetensors"
    save_file(equal_lengths(source.batches(base.tokenizer, base.spec).batches), ids)
    made: dict[str, Path] = {}
    for peer, requirements in PEERS.items():
        python = python_of(peer, requirements, environments)
        folder, weights = output / f"{peer}-int4", output / f"{peer}.safetensors"
        files = {"--model": base.transformer, "--ids": ids, "--weights": weights}
        command = [python, Path(__file__).resolve(), "--worker", peer]
        command += [part for option, path in files.items() for part in (option, path.resolve())]
        print(f"{peer}: quantizing", file=sys.stderr, flush=True)
        done = subprocess.run(command, env=peer_environment(), cwd=output, capture_output=True, text=True)
        (output / f"{peer}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        if done.returncode:
            print(f"{peer}: could not: {done.stderr.strip().splitlines()[-1]}\n(all of it in {output / peer}.log)", flush=True)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base.path, folder)
        file = ModelFolder(peer, folder).transformer / "model.safetensors"
        before, quantized = load_file(file), load_file(weights)
        if strange := quantized.keys() - before.keys():
            sys.exit(f"{peer}: {sorted(strange)[0]} is not in {file.name}")
        save_file({name: quantized.get(name, tensor).float() for name, tensor in before.items()}, file, {"format": "pt"})
        made[peer] = folder
    return made


def write_nf4(run: Path, output: Path) -> Path:
    """Compress the run's base to NF4 with our own method."""
    from compress.models.source import find
    from compress.pipeline.run import run as run_recipe

    recipe = output / "nf4.yaml"
    recipe.write_text("steps: [{method: bitsandbytes, format: nf4}]\nmeasure: {what: []}\n", encoding="utf-8")
    base = find(str(run)).compressed.base
    return output / run_recipe(recipe, model=base, output=output, compress_only=True).run


def main() -> None:
    """Quantize with the peers and compare; or, as a subprocess, run one peer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    if "--worker" in sys.argv:
        for option in ("--worker", "--model", "--ids", "--weights"):
            parser.add_argument(option)
        work(parser.parse_args())
        return

    from environments import add_environments_option

    from compress.common.cache import cache_root
    from compress.measure.accuracy.statistics import Interval
    from compress.measure.evaluate import EvaluationOptions, evaluate

    parser.add_argument("--run", type=Path, required=True, help="folder of our run, which kept its variant")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=cache_root() / "peers-int4", help="folder for what the peers make")
    add_environments_option(parser)
    arguments = parser.parse_args()
    check(arguments.run)
    output = arguments.work.resolve()
    folders = {**write_peers(arguments.run, output, arguments.environments), "nf4": write_nf4(arguments.run, output)}

    def shown(interval: Interval | None) -> str:
        if interval is None:
            return ""
        return f"{100 * interval.delta:+8.2f}  [{100 * interval.low:+.2f}, {100 * interval.high:+.2f}]"

    summary: dict[str, Any] = {}
    for peer, folder in folders.items():
        found = evaluate(
            str(arguments.run), arguments.tasks.split(","), EvaluationOptions(data=arguments.data), against=str(folder),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
        summary[peer] = found.model_dump(mode="json", exclude={"mteb"})
        print(f"\n{'ours - ' + peer:28}{'theirs':>8}{'ours':>8}{'delta':>8}  95 % interval")
        for row in found.tasks:
            print(f"{row.task:28}{100 * row.baseline:8.2f}{100 * row.variant:8.2f}{shown(row.interval)}")
        print(f"{'mean':44}{shown(found.overall)}", flush=True)
    (output / "comparison.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
