"""Can float32 replace the float16 baseline on a CPU, where float16 is slow? Scores and cosines of both.

python benchmarks/half_baseline.py [--model minilm] [--tasks mini] [--data FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import compress
from compress.data.texts import mixed_texts
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import find_tasks
from compress.measure.vectors.fidelity import fidelity


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", default="mini", help="task names, separated by commas")
    parser.add_argument("--data", type=Path, default=None)
    arguments = parser.parse_args()

    half, single = (compress.load(arguments.model, device="cpu", dtype=dtype) for dtype in ("float16", "float32"))
    for task in find_tasks(arguments.tasks.split(","), arguments.data):
        scores = score_task(half, task).score, score_task(single, task).score
        print(f"{task.name}: float16 {scores[0]:.5f}, float32 {scores[1]:.5f}, difference {scores[0] - scores[1]:+.5f}")
    texts = mixed_texts(256, 0)
    print(fidelity(half.encode(texts), single.encode(texts)))


if __name__ == "__main__":
    main()
