"""Ablation of distillation: one ingredient removed or added at a time, on 50,000 texts, with about the same training time.

    python benchmarks/ablation.py --texts texts.jsonl.gz --data FOLDER --tasks STSBenchmark,STS12,SICK-R,BIOSSES,...

Two students of MiniLM's: half of its own blocks, and a new one of nano's kind. Each arm is a recipe, run through the whole
pipeline; an arm that is there is not run again, and one that was stopped goes on. Hidden states want the teacher beside the student
at every step: fewer steps. Steps are set for a quarter of an hour on two cores with AVX512-BF16.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run

HALF: dict[str, Any] = {"batch": 64, "learning_rate": 3e-4, "steps": 3400}
NEW: dict[str, Any] = {"batch": 128, "learning_rate": 1e-3, "steps": 1500}
STUDENT = {
    "architecture": "nv-embed", "width": 384, "blocks": 4, "heads": 6, "kv_heads": 2, "mlp": 640, "latents": 32,
    "latent_heads": 4, "vocabulary": 12_000, "max_length": 256,
}  # fmt: skip
COSINE, BOTH = {"cosine": 1.0}, {"cosine": 1.0, "similarity": 10.0}
ARMS: dict[str, dict[str, Any]] = {
    "half the blocks: cosine": {**HALF, "objectives": COSINE},
    "half the blocks: cosine, similarity": {**HALF, "objectives": BOTH},
    "half the blocks: cosine, similarity, hidden": {**HALF, "objectives": BOTH, "hidden": 1.0, "steps": 1700},
    "new: cosine, similarity, tokens from the teacher": {**NEW, "objectives": BOTH, "student": STUDENT},
    "new: cosine, similarity, tokens at random": {**NEW, "objectives": BOTH, "student": {**STUDENT, "tokens": "random"}},
}


def recipe_of(name: str, arm: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return an arm as a recipe."""
    texts = {"texts": str(arguments.texts.resolve()), "count": 51_000, "held_out": 1_000, "max_tokens": 128}
    distill = {"method": "distill", **texts, "every": 250, **arm}
    pruned = [] if "student" in arm else [{"method": "depth", "keep": 0.5}]
    return {
        "name": re.sub(r"\W+", "-", name),
        "description": name,
        "model": arguments.model,
        "steps": [*pruned, distill],
        "evaluate": {"tasks": arguments.tasks.split(","), "data": str(arguments.data) if arguments.data else None},
        "measure": {"what": ["fidelity"]},
        "export": [],
    }


def main() -> None:
    """Run the arms and print the score that each keeps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--arms", default="", help="names of some of them, separated by semicolons")
    parser.add_argument("--runs", type=Path, default=Path("results-ablation"))
    arguments = parser.parse_args()
    wanted = [part.strip() for part in arguments.arms.split(";") if part.strip()]
    print("| student, asked for | steps | trained for | held-out cosine | kept | 95 % interval |\n|---|---|---|---|---|---|")
    for name, arm in ARMS.items():
        if wanted and name not in wanted:
            continue
        record = run(parse_recipe(recipe_of(name, arm, arguments), name), output=arguments.runs)
        curve = next(step.found["curve"] for step in record.steps if "curve" in step.found)
        baseline = sum(task.baseline for task in record.tasks) / len(record.tasks)
        interval = record.overall
        ends = f"{100 * (1 + interval.low / baseline):.2f} to {100 * (1 + interval.high / baseline):.2f}" if interval else "-"
        kept = f"{100 * (record.retained or 0):.2f} %"
        trained = f"{curve[-1]['seconds'] / 60:.1f} min"
        print(f"| {name} | {curve[-1]['step']:,} | {trained} | {curve[-1]['cosine']:.4f} | {kept} | {ends} |", flush=True)


if __name__ == "__main__":
    main()
