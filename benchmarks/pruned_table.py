"""Score kept and speedup after dropping blocks, sublayers, heads and channels, from runs that kept their variants.

    compress run depth-50.yaml --data FOLDER --tasks STSBenchmark,STS12,SICK-R,BIOSSES,Banking77Classification,SciFact
    ...
    python benchmarks/pruned_table.py results/*

Kept: mean of the main scores over the baseline's. Speed: float32 in torch, original and variants in processes of their own, in
turn within each round; median of the rounds' ratios. Promised: the operations in the blocks' linear layers and attention over those
that are left, at the texts' own mean length; embeddings, norms, pooling and tokenizing are not in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.data.texts import measure_texts
from compress.measure.record import Record
from compress.measure.speed.timing import Candidate, measure_speed, speed_ratio
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.models.source import find
from compress.reports.compare import line_of


def in_blocks(shape: ModelShape) -> int:
    """Return the number of parameters of the blocks' linear layers."""
    return sum(info.parameters for info in shape.block_linears.values())


def said(record: Record) -> str:
    """Describe the steps."""
    words = []
    for step in record.steps:
        config = step.config
        if config["method"] == "depth":
            dropped = ", ".join(map(str, config["drop"]))
            words.append(f"{config['what']} {dropped} dropped ({config['criterion']})")
        elif config["method"] == "width":
            shares = [f"{config[key]:.3g} of the {key}" for key in ("heads", "channels") if config[key] < 1]
            words.append(f"{' and '.join(shares)} kept ({config['criterion']}{'' if config['refit'] else ', not refitted'})")
        else:
            words.append(config["method"])
    return "; ".join(words)


def main() -> None:
    """Measure and print the table, best first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--texts", default="mini", help="JSONL file with `text`, or mini")
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    records = {str(run): Record.read(run) for run in arguments.runs}
    (base,) = {record.model.name for record in records.values()}
    source = find(base)
    texts = measure_texts(arguments.texts, arguments.count, 0)
    candidates = {"base": Candidate({"model": str(source.path), "device": "cpu", "dtype": "float32"})}
    candidates |= {run: Candidate({"model": run, "device": "cpu", "dtype": "float32"}) for run in records}
    speeds = measure_speed(candidates, texts, rounds=arguments.rounds, requests=10, threads=arguments.threads)
    whole = source.shape
    length = round(speeds["base"].tokens_per_second / speeds["base"].texts_per_second)
    headings = ("dropped", "parameters of the blocks", "file", "kept", "95 % interval", "cosine", "faster", "promised", "of it")
    print(f"{len(texts)} texts of {length} tokens on the mean, {arguments.rounds} rounds")
    print("| " + " | ".join(headings) + " |\n|" + "---|" * len(headings))
    for run, record in sorted(records.items(), key=lambda item: -(item[1].retained or 0)):
        assert record.retained is not None
        assert record.fidelity is not None
        shape = ModelFolder(run, Path(run) / "variant").shape
        line = line_of(record)
        assert line.low is not None
        assert line.high is not None
        faster = speed_ratio(speeds[run], speeds["base"])
        promised = whole.flops_per_token(length) / shape.flops_per_token(length)
        is_float = not VariantInfo.read(Path(run) / "variant").quantized
        cells = [
            said(record),
            f"{100 * in_blocks(shape) / in_blocks(whole):.0f} %" if is_float else "",
            f"{record.row('variant').size_bytes / 1e6:.1f} MB",
            f"{100 * record.retained:.2f} %",
            f"{100 * line.low:.2f} to {100 * line.high:.2f}",
            f"{record.fidelity.cosine_mean:.4f}",
            f"{faster:.2f}x",
            *((f"{promised:.2f}x", f"{faster / promised:.2f}") if is_float else ("", "")),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
