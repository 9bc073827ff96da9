"""Time and memory for a model larger than memory: written with random weights, compressed and run block by block.

    python benchmarks/streamed.py                                                # NV-Embed-v2 at full size: 24 GB of disk
    python benchmarks/streamed.py random:nvidia/NV-Embed-v2,num_hidden_layers=2  # a smaller shape
    python benchmarks/streamed.py random:nvidia/NV-Embed-v2,num_hidden_layers=4 --recipe recipes/int4-gptq.yaml --kill-after 3

Each part runs in a process of its own, whose anonymous memory is watched from before torch is imported. With `--kill-after N` the
one that compresses is killed once N segments are done (the embeddings are the first), and a second one goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from compress.common.memory import PeakAnonymous
from compress.models.files.headers import weight_bytes

RECIPE = Path(__file__).parents[1] / "recipes" / "int8.yaml"
TOKENS = 64


def write(model: str, _: str, __: Path) -> str:
    """Write the checkpoint, unless it exists."""
    from compress.models.source import find

    return str(find(model).path)


def compress(model: str, output: str, recipe: Path) -> str:
    """Fold and quantize the model."""
    from compress.pipeline.run import run

    record = run(recipe, model=model, output=output, compress_only=True, device="cpu")
    return str(Path(output) / record.run / "variant")


def encode(model: str, _: str, __: Path) -> str:
    """Encode one text of 64 tokens."""
    from compress.runtimes.loading import load
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


PARTS: dict[str, Callable[[str, str, Path], str]] = {"write": write, "compress": compress, "encode": encode}


def command_of(part: str, model: str, output: str, recipe: Path) -> list[str]:
    """Return the command of a process that does a part."""
    return [sys.executable, __file__, model, "--runs", output, "--recipe", str(recipe), "--part", part]


def killed(model: str, output: str, recipe: Path, after: int) -> None:
    """Start the compression, and kill the process after a number of segments."""
    start, peak = time.perf_counter(), 0
    before = set(Path(output).glob(".*.partial"))
    process = subprocess.Popen(command_of("compress", model, output, recipe), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text(encoding="ascii"), re.M)
        peak = max(peak, int(found.group(1)) * 1024 if found else 0)
        done = [path for folder in set(Path(output).glob(".*.partial")) - before for path in folder.glob("journal/segment-*.json")]
        if len(done) >= after:
            process.kill()
            process.wait()
            print(
                f"killed    {time.perf_counter() - start:7.1f} s, peak anonymous memory {peak / 1e9:.2f} GB, {after} segments done"
            )
            return
        time.sleep(0.02)
    raise SystemExit("the process ended before it was killed; use a smaller --kill-after")


def measured(part: str, model: str, output: str, recipe: Path) -> str:
    """Run a part in a fresh process, print its time and memory, and return its output."""
    result = subprocess.run(command_of(part, model, output, recipe), check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(result.stdout.splitlines()[-1])
    size = f", {weight_bytes(Path(found['answer'])) / 1e9:.2f} GB on disk" if Path(found["answer"]).is_dir() else ""
    print(f"{part:9} {found['seconds']:7.1f} s, peak anonymous memory {found['peak'] / 1e9:.2f} GB{size}", flush=True)
    return str(found["answer"])


def main() -> None:
    """Run the parts one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="random:nvidia/NV-Embed-v2")
    parser.add_argument("--runs", default="results")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--kill-after", type=int, metavar="N", help="kill and continue the compression once N segments are done")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        start = time.perf_counter()
        with PeakAnonymous() as peak:
            answer = PARTS[arguments.part](arguments.model, arguments.runs, arguments.recipe)
        print(json.dumps({"answer": answer, "seconds": time.perf_counter() - start, "peak": peak.bytes}))
        return
    measured("write", arguments.model, arguments.runs, arguments.recipe)
    if arguments.kill_after:
        killed(arguments.model, arguments.runs, arguments.recipe, arguments.kill_after)
    variant = measured("compress", arguments.model, arguments.runs, arguments.recipe)
    for name, model in (("as it is", arguments.model), ("compressed", variant)):
        print(f"one text of {TOKENS} tokens, streamed, the model {name}:")
        measured("encode", model, arguments.runs, arguments.recipe)


if __name__ == "__main__":
    main()
