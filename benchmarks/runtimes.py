"""Variants of one model, each in the runtime for which it was made, against the model in torch.

    python benchmarks/runtimes.py results/<run> results/<run> ... --count 320
    python benchmarks/runtimes.py results/<run of a random: model> ... --count 24 --rounds 3 --requests 10

Every candidate has a process of its own, all on the same texts, in turn within each round; ratios are medians over rounds. Cosines
are to the model's own float32 vectors.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import compress
from compress.data.texts import measure_texts
from compress.measure.speed.timing import Candidate, measure_speed, speed_ratio
from compress.measure.vectors.fidelity import cosines
from compress.models.source import find


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs that kept their variants, all of one model")
    parser.add_argument("--texts", default="mini", help="JSONL file with `text`, or mini")
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="single texts for latency")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    infos = {run: find(str(run)).compressed for run in arguments.runs}
    if len({info.base_fingerprint for info in infos.values()}) > 1:
        parser.error("these are not variants of one model: " + ", ".join(sorted({info.base for info in infos.values()})))
    base = str(find(next(iter(infos.values())).base).path)
    candidates = {
        f"{dtype}, torch": Candidate({"model": base, "dtype": dtype, "device": "cpu"}) for dtype in ("float32", "bfloat16")
    }
    for run, info in infos.items():
        name = f"{info.weights} x {info.activations}, {info.runtime}" + (f" {info.dtype}" if info.dtype else "")
        candidates[name] = Candidate({"model": str(run), "device": "cpu"})
    texts = measure_texts(arguments.texts, arguments.count, arguments.seed)
    agreement = {}
    reference = None
    for name, candidate in candidates.items():  # one model in memory at a time
        vectors = compress.load(**candidate.arguments).encode(texts)
        reference = vectors if reference is None else reference
        agreement[name] = cosines(reference, vectors)
    speeds = measure_speed(candidates, texts, rounds=arguments.rounds, requests=arguments.requests)
    first = next(iter(speeds.values()))
    print("| | texts/s | tokens/s | vs float32 | p50 ms | loaded MB | peak MB | cosine | lowest |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, speed in speeds.items():
        megabytes = [(count or np.nan) / 1e6 for count in (speed.loaded_bytes, speed.peak_bytes)]
        print(
            f"| {name} | {speed.texts_per_second:.1f} | {speed.tokens_per_second:,.0f} | {speed_ratio(speed, first):.2f}x "
            f"| {speed.latency_p50_ms:.1f} | {megabytes[0]:.0f} | {megabytes[1]:.0f} "
            f"| {agreement[name].mean():.5f} | {agreement[name].min():.5f} |"
        )


if __name__ == "__main__":
    main()
