"""The embedded reference model against its teacher: scores with and without NV-Embed's instructions, texts per second.

python benchmarks/nano.py --data FOLDER --tasks STSBenchmark,STS12,SICK-R,BIOSSES,Banking77Classification,SciFact
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean

from compress.data.texts import mixed_texts
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.measure.speed.timing import Candidate, measure_speed, speed_ratio
from compress.models.source import find

TEXTS, ROUNDS, REQUESTS = 256, 5, 100


def scores(model: str, arguments: argparse.Namespace, prompts: dict[str, str]) -> dict[str, float]:
    """Return a model's main scores by task."""
    options = EvaluationOptions(data=arguments.data, prompts=prompts, device="cpu")
    found = evaluate(model, arguments.tasks.split(","), options)
    return {row.task: 100 * row.variant for row in found.tasks}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    nothing = dict.fromkeys(find(arguments.model).spec.prompts, "")
    teacher = scores(arguments.teacher, arguments, {})
    instructed, plain = (scores(arguments.model, arguments, prompts) for prompts in ({}, nothing))
    print(f"| task | {arguments.teacher} | {arguments.model}, instructed | without instructions |\n|---|---|---|---|")
    for task, score in teacher.items():
        print(f"| {task} | {score:.2f} | {instructed[task]:.2f} | {plain[task]:.2f} |")
    means = [mean(each.values()) for each in (teacher, instructed, plain)]
    print(f"| mean | {means[0]:.2f} | {means[1]:.2f} | {means[2]:.2f} |")
    print(f"| of the teacher's | | {100 * means[1] / means[0]:.2f} % | {100 * means[2] / means[0]:.2f} % |")
    candidates = {
        f"{name}, {dtype}": Candidate({"model": name, "device": "cpu", "dtype": dtype})
        for dtype in ("float32", "bfloat16")
        for name in (arguments.teacher, arguments.model)
    }
    speeds = measure_speed(candidates, mixed_texts(TEXTS, 0), rounds=ROUNDS, requests=REQUESTS)
    first = next(iter(speeds.values()))
    print("\n| | texts/s | ratio | p50 ms | peak memory |\n|---|---|---|---|---|")
    for name, speed in speeds.items():
        memory = f"{(speed.peak_bytes or 0) / 1e6:.0f} MB"
        print(
            f"| {name} | {speed.texts_per_second:.0f} | {speed_ratio(speed, first):.2f}x | {speed.latency_p50_ms:.1f} | {memory} |"
        )


if __name__ == "__main__":
    main()
