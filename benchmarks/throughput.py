"""Throughput on a file of texts: a run's variant, our float32 and bfloat16, and plain `SentenceTransformer.encode`.

    python benchmarks/throughput.py results/<run> --texts texts.jsonl.gz --count 1000

Every candidate has a process of its own, all on the same texts, in turn within each round; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compress.data.texts import measure_texts
from compress.measure.speed.timing import Candidate, measure_speed, speed_ratio
from compress.models.source import find

PEER_BATCH = 32


class SentenceTransformersPeer:
    """Plain sentence-transformers, with the part of the Embedder protocol that the measurement calls."""

    def __init__(self, model: str) -> None:
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(model, device="cpu")

    def encode(self, texts: Iterable[str], batch_tokens: int | None = None) -> Any:
        return self._model.encode(list(texts), batch_size=PEER_BATCH, show_progress_bar=False)


def preload(**_: object) -> None:
    import sentence_transformers  # noqa: F401  its imports are not the model's memory


def load_peer(model: str) -> SentenceTransformersPeer:
    return SentenceTransformersPeer(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run that kept its variant")
    parser.add_argument("--texts", default="mini", help="JSONL file with `text`, or mini")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    base = str(find(find(str(arguments.run)).compressed.base).path)
    beside = {"PYTHONPATH": str(Path(__file__).parent)}
    candidates = {
        "variant": Candidate({"model": str(arguments.run), "device": "cpu"}),
        "float32": Candidate({"model": base, "dtype": "float32", "device": "cpu"}),
        "bfloat16": Candidate({"model": base, "dtype": "bfloat16", "device": "cpu"}),
        "sentence-transformers": Candidate({"model": base}, "throughput:load_peer", beside),
    }
    texts = measure_texts(arguments.texts, arguments.count, arguments.seed)
    speeds = measure_speed(candidates, texts, rounds=arguments.rounds, requests=100)
    peer = speeds["sentence-transformers"]
    print(f"{'':24}{'texts/s':>9}{'tokens/s':>10}{'vs peer':>9}{'p50 ms':>8}{'p99 ms':>8}{'loaded MB':>11}{'peak MB':>9}")
    for name, speed in speeds.items():
        print(
            f"{name:24}{speed.texts_per_second:9.0f}{speed.tokens_per_second:10,.0f}{speed_ratio(speed, peer):8.2f}x"
            f"{speed.latency_p50_ms:8.1f}{speed.latency_p99_ms:8.1f}"
            f"{(speed.loaded_bytes or 0) / 1e6:11.1f}{(speed.peak_bytes or 0) / 1e6:9.1f}"
        )


if __name__ == "__main__":
    main()
