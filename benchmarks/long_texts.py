"""Time and memory by text length, up to the maximum length of a model.

    python benchmarks/long_texts.py                     # a narrow NV-Embed, random weights, to its 32,768 tokens
    python benchmarks/long_texts.py MODEL --lengths 512,2048,8192

Each length in a process of its own; two texts of different lengths in one call, so that padding would want a mask if it were done.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from compress.common.memory import PeakAnonymous, anonymous_bytes

MODEL = (
    "random:nvidia/NV-Embed-v2,num_hidden_layers=2,hidden_size=512,intermediate_size=1024,num_attention_heads=8,"
    "num_key_value_heads=2,num_latents_value=64,num_cross_heads=2,cross_dim_head=512"
)


def one(model: str, length: int) -> dict[str, float]:
    """Encode two texts of about `length` tokens."""
    import compress

    embedder = compress.load(model, device="cpu")
    embedder.encode(["a short text to warm up"])
    words = ["some", "words", "in", "a", "long", "text"]
    texts = [" ".join(words[index % 6] for index in range(length * 2))[: length * 4 - cut] for cut in (0, 400)]
    tokens = [len(row) for row in embedder.tokenizer(texts)]  # type: ignore[attr-defined]
    before = anonymous_bytes() or 0
    start = time.perf_counter()
    with PeakAnonymous() as peak:
        embedder.encode(texts, batch_tokens=4 * length)
    return {"tokens": max(tokens), "seconds": time.perf_counter() - start, "bytes": (peak.bytes or 0) - before}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=MODEL)
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.model, arguments.one)))
        return
    print(f"{'tokens':>8}{'seconds':>10}{'s per 1,000':>13}{'MB':>9}{'KB a token':>12}")
    for length in map(int, arguments.lengths.split(",")):
        command = [sys.executable, __file__, arguments.model, "--one", str(length)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        tokens = found["tokens"]
        print(
            f"{tokens:8,}{found['seconds']:10.2f}{1000 * found['seconds'] / tokens:13.3f}{found['bytes'] / 1e6:9.0f}"
            f"{found['bytes'] / tokens / 1e3:12.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
