"""A static table against model2vec's of the same teacher: distilled plainly, and trained on the same texts by its own trainer.

    pip install 'model2vec[distill,train]'
    python benchmarks/static_peers.py results/<run> --texts static.jsonl.gz --data FOLDER --tasks STSBenchmark,STS12,...

model2vec's tables are kept under `--work`, and read as every folder of its layout is. Its trainer gets the teacher's vectors, a
linear head that it throws away afterwards, learned factors of tokens, and otherwise its own defaults: cosine, early stopping.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.methods.distill.data import Teacher, different, lessons
from compress.models.source import find


def make_peers(arguments: argparse.Namespace) -> Iterator[tuple[str, Path, float | None]]:
    """Yield model2vec's tables: name, folder, and the seconds that it took to make; None if it was there."""
    from model2vec import StaticModel
    from model2vec.distill import distill
    from model2vec.train.similarity import StaticModelForSimilarity

    teacher = find(arguments.teacher)
    plain, trained = arguments.work / "plain", arguments.work / "trained"
    start = time.perf_counter()
    made = not plain.exists()
    if made:
        distill(str(teacher.path), pca_dims=arguments.width, device="cpu").save_pretrained(plain)
    yield "model2vec", plain, time.perf_counter() - start if made else None
    made = not trained.exists()
    if made:
        texts = lessons(different(arguments.texts, frozenset())[0], arguments.count, (), 0.0, same_prompts=True, seed=0)
        vectors = Teacher(teacher, "cpu").vectors(texts)
        start = time.perf_counter()  # the teacher's vectors are not counted: they are those that ours learned from
        model = StaticModelForSimilarity.from_static_model(
            model=StaticModel.from_pretrained(plain), n_layers=0, out_dim=vectors.shape[1], freeze_weights=False
        )
        model.fit(texts.texts, vectors, device="cpu", max_epochs=arguments.epochs)
        model.to_static_model().save_pretrained(trained)
    yield "model2vec, trained", trained, time.perf_counter() - start if made else None


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="folders of runs that kept their variant")
    parser.add_argument("--teacher", default="minilm")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--count", type=int, help="texts to train on; all by default")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=-1, help="epochs of model2vec's trainer; -1: until it stops by itself")
    parser.add_argument("--tasks", default="mini")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, default=Path("static-peers"))
    arguments = parser.parse_args()
    rows = [(Path(run).name, str(run), None) for run in arguments.runs]
    rows += [(name, str(folder), seconds) for name, folder, seconds in make_peers(arguments)]
    tasks = arguments.tasks.split(",")
    print(f"| table | trained for | {' | '.join(tasks)} | mean |\n|---|---:|{'---:|' * (len(tasks) + 1)}")
    for name, folder, seconds in rows:
        found = {row.task: 100 * row.variant for row in evaluate(folder, tasks, EvaluationOptions(data=arguments.data)).tasks}
        spent = "" if seconds is None else f"{seconds:,.0f} s"
        print(
            f"| {name} | {spent} | {' | '.join(f'{score:.2f}' for score in found.values())} | {mean(found.values()):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
