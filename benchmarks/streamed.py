"""What a model larger than the memory takes: written with random weights, compressed and run block by block.

    python benchmarks/streamed.py                                                # NV-Embed-v2 at full size: 24 GB of disk
    python benchmarks/streamed.py random:nvidia/NV-Embed-v2,num_hidden_layers=2  # a smaller shape

Each part runs in a process of its own, whose anonymous memory is watched from before torch is imported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compress.memory import PeakAnonymous
from compress.models.checkpoint import weight_bytes

RECIPE = Path(__file__).parents[1] / "recipes" / "int8.yaml"
TOKENS = 64


def write(model: str, _: str) -> str:
    """Write the checkpoint, or find it written."""
    from compress.loading import find

    return str(find(model).folder)


def compress(model: str, output: str) -> str:
    """Fold and quantize it."""
    from compress.pipeline import run

    record = run(RECIPE, model=model, output=output, compress_only=True, device="cpu")
    return str(Path(output) / record.run / "variant")


def encode(model: str, _: str) -> str:
    """Encode one text of 64 tokens."""
    from compress.loading import load
    from compress.runtimes.streamed import StreamedEmbedder

    embedder = load(model, device="cpu", stream=True)
    assert isinstance(embedder, StreamedEmbedder)
    text = ""
    for piece in (" some", " words", " a", ".") * TOKENS:
        if len(embedder.tokenizer([text + piece])[0]) <= TOKENS:
            text += piece
    assert len(embedder.tokenizer([text])[0]) == TOKENS
    vectors = embedder.encode([text])
    assert vectors.shape[0] == 1
    return model


PARTS: dict[str, Callable[[str, str], str]] = {"write": write, "compress": compress, "encode": encode}


def measured(part: str, model: str, output: str) -> str:
    """Run a part in a fresh process, print its time and memory, return its answer."""
    command = [sys.executable, __file__, model, "--output", output, "--part", part]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    size = f", {weight_bytes(Path(found['answer'])) / 1e9:.2f} GB on disk" if Path(found["answer"]).is_dir() else ""
    print(f"{part:9} {found['seconds']:7.1f} s, peak anonymous memory {found['peak'] / 1e9:.2f} GB{size}", flush=True)
    return str(found["answer"])


def main() -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:nvidia/NV-Embed-v2")
    parser.add_argument("--output", default="results")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        start = time.perf_counter()
        with PeakAnonymous() as peak:
            answer = PARTS[arguments.part](arguments.model, arguments.output)
        print(json.dumps({"answer": answer, "seconds": time.perf_counter() - start, "peak": peak.bytes}))
        return
    measured("write", arguments.model, arguments.output)
    variant = measured("compress", arguments.model, arguments.output)
    for name, model in (("as it is", arguments.model), ("compressed", variant)):
        print(f"one text of {TOKENS} tokens, streamed, the model {name}:")
        measured("encode", model, arguments.output)


if __name__ == "__main__":
    main()
