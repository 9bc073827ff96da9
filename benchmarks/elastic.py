"""One training for all depths (`depth: any`) against a training of its own for each depth.

    python benchmarks/elastic.py --texts texts.jsonl.gz --model minilm --data FOLDER --tasks STSBenchmark,STS12,...
    python benchmarks/elastic.py --texts texts.jsonl.gz --model nano --depths 1,2 --exits 1,2,3

Each arm is a recipe, run through the whole pipeline; an arm that is there is not run again, and one that was stopped goes on. All
arms have the same texts, objectives, batches and steps. A depth of its own keeps the first blocks, as a cut does, or those that
`depth` chooses with `criterion: greedy`. Both may be better than the cut, which shares its blocks with the other depths.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from compress.measure.accuracy.statistics import Interval
from compress.measure.record import Record
from compress.models.source import find_shape
from compress.pipeline.recipe_file import parse_recipe
from compress.pipeline.run import run


def recipe_of(name: str, pruning: list[dict[str, Any]], arm: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return an arm as a recipe."""
    texts = {"texts": str(arguments.texts.resolve()), "count": arguments.count, "held_out": arguments.held_out, "max_tokens": 128}
    learning = {"objectives": {"cosine": 1.0, "similarity": 10.0}, "batch": arguments.batch, "learning_rate": 3e-4}
    steps = {"steps": arguments.steps, "every": min(250, arguments.steps)}
    return {
        "name": name,
        "model": arguments.model,
        "steps": [*pruning, {"method": "distill", **texts, **learning, **steps, **arm}],
        "evaluate": {"tasks": arguments.tasks.split(","), "data": str(arguments.data) if arguments.data else None},
        "measure": {"what": ["fidelity"]},
        "export": [],
    }


def done(name: str, pruning: list[dict[str, Any]], arm: dict[str, Any], arguments: argparse.Namespace) -> Record:
    """Run an arm, or return its record."""
    return run(parse_recipe(recipe_of(name, pruning, arm, arguments), name), output=arguments.runs, device=arguments.device)


def show(arm: str, depth: int, retained: float | None, overall: Interval | None, record: Record, cosine: float | None) -> None:
    """Print a row."""
    curve = next(step.found["curve"] for step in record.steps if "curve" in step.found)
    baseline = sum(task.baseline for task in record.tasks) / len(record.tasks)
    ends = f"{100 * (1 + overall.low / baseline):.2f} to {100 * (1 + overall.high / baseline):.2f}" if overall else "-"
    kept, lost = 100 * (retained or 0), 100 * baseline * (1 - (retained or 0))
    shown = "-" if cosine is None else f"{cosine:.4f}"
    print(f"| {arm} | {depth} | {kept:.2f} % | {ends} | {lost:.2f} | {shown} | {curve[-1]['seconds'] / 60:.1f} |", flush=True)


def main() -> None:
    """Run the arms and print what each keeps at each depth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--count", type=int, default=51_000)
    parser.add_argument("--held-out", type=int, default=1_000)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--depths", default="", help="depths that get a training of their own; all but the whole by default")
    parser.add_argument("--exits", default="2", help="values of `exits`, a training each")
    parser.add_argument("--blocks", default="first,greedy", help="which blocks a depth of its own keeps")
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument("--runs", type=Path, default=Path("results-elastic"))
    arguments = parser.parse_args()
    blocks = find_shape(arguments.model).blocks
    depths = [int(depth) for depth in arguments.depths.split(",") if depth] or list(range(1, blocks))
    print("| trained for | depth | kept | 95 % interval | points lost | cosine | minutes |\n|---|---:|---:|---:|---:|---:|---:|")
    for exits in arguments.exits.split(","):
        record = done(f"elastic-{exits}", [], {"depth": "any", "exits": int(exits)}, arguments)
        for row in record.depths:
            show(f"all depths, `exits: {exits}`", row.depth, row.retained, row.overall, record, row.cosine_mean)
    for chosen in arguments.blocks.split(","):
        for depth in depths:
            kept = {"drop": list(range(depth, blocks))} if chosen == "first" else {"keep": depth / blocks}
            record = done(f"alone-{chosen}-{depth}", [{"method": "depth", **kept}], {}, arguments)
            cosine = record.fidelity.cosine_mean if record.fidelity else None
            show(f"this depth, {chosen} blocks", depth, record.retained, record.overall, record, cosine)


if __name__ == "__main__":
    main()
