"""Overhead of the evaluation: ours against mteb's own with sentence-transformers, and how its time is spent.

    python benchmarks/harness.py
    python benchmarks/harness.py --data FOLDER --tasks STSBenchmark,SciFact --rounds 1

For each task: seconds of ours and of `mteb.evaluate` on a plain `SentenceTransformer`, the same model and data, in turn; of ours
what is encoding, what is mteb's own scorers (by its own clock, in an evaluation whose vectors are at hand), and the rest.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from statistics import median
from typing import Any

import mteb
from sentence_transformers import SentenceTransformer

import compress
from compress.measure.accuracy.score import score_task
from compress.measure.accuracy.tasks import Task, find_tasks
from compress.models.embedder import Vectors
from compress.models.source import find


class Timed:
    """An embedder that sums the time of its calls and caches its vectors, so that a second round takes no time."""

    def __init__(self, embedder: Any) -> None:
        self._embedder = embedder
        self.name, self.spec, self.dimension = embedder.name, embedder.spec, embedder.dimension
        self.seconds = 0.0
        self.kept: dict[tuple[str | None, tuple[str, ...]], Vectors] = {}

    def encode(self, texts: Any, prompt: str | None = None, **arguments: Any) -> Vectors:
        """Embed texts, or answer as before."""
        key = (prompt, tuple(texts))
        if key not in self.kept:
            start = time.perf_counter()
            self.kept[key] = self._embedder.encode(texts, prompt, **arguments)
            self.seconds += time.perf_counter() - start
        return self.kept[key]


# Phases of mteb's that are not encoding; others lie within these.
SCORERS = ("Scoring", "Searching corpus", "Computing similarity")


def ours(embedder: Any, task: Task) -> tuple[float, float, float, float]:
    """Return the score, the total seconds, the seconds of encoding and the seconds of mteb's scorers."""
    timed = Timed(embedder)
    start = time.perf_counter()
    found = score_task(timed, task)
    total, encoding = time.perf_counter() - start, timed.seconds
    phases = score_task(timed, task).mteb["evaluation_phases"] or []
    return found.score, total, encoding, sum(phase["end"] - phase["start"] for phase in phases if phase["name"] in SCORERS)


def theirs(model: SentenceTransformer, task: Task) -> tuple[float, float]:
    """Return mteb's own score and seconds; its random state is reset, as ours is."""
    task.mteb.rng_state = random.Random(task.mteb.seed)
    start = time.perf_counter()
    result = mteb.score_task(
        model, task.mteb, cache=None, co2_tracker=False, overwrite_strategy="always", show_progress_bar=False,
        encode_kwargs={"batch_size": 32, "show_progress_bar": False},
    )  # fmt: skip
    return float(result.task_results[0].get_score()), time.perf_counter() - start


def main() -> None:
    """Measure both in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    embedder = compress.load(arguments.model, device="cpu", dtype="float32")
    model = SentenceTransformer(str(find(arguments.model).path), device="cpu")
    for warm in (embedder, model):
        warm.encode(["a few texts", "to warm both"] * 20)
    headings = ("score", "mteb", "ours s", "mteb s", "ratio", "encoding", "scorers", "rest/encoding")
    print(f"{'task':28}" + "".join(f"{heading:>{max(9, len(heading) + 2)}}" for heading in headings))
    for task in find_tasks(arguments.tasks.split(","), arguments.data):
        rounds = [(ours(embedder, task), theirs(model, task)) for _ in range(arguments.rounds)]
        total, encoding, without = (median(own[place] for own, _ in rounds) for place in (1, 2, 3))
        peer = median(other[1] for _, other in rounds)
        ratio = median(other[1] / own[1] for own, other in rounds)
        rest = median(own[1] - own[2] - own[3] for own, _ in rounds)
        print(
            f"{task.name:28}{100 * rounds[0][0][0]:9.2f}{100 * rounds[0][1][0]:9.2f}{total:9.2f}{peer:9.2f}{ratio:8.2f}x"
            f"{encoding:10.2f}{without:9.2f}{100 * rest / encoding:13.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
