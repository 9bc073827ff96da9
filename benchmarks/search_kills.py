"""Does a search that is killed at random moments end in the same recipe?

python benchmarks/search_kills.py nano --max-size 8MB --choices int8,int4,int3 --kills 5

The search runs once without interruption; that takes T seconds. Then it is started with another cache, and killed after a random
share of T, five times. The last start runs to its end, and both recipes and both records of why are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def without_seconds(path: Path) -> Any:
    """Return a record of why without its times."""
    return json.loads(path.read_text(), object_hook=lambda found: {k: v for k, v in found.items() if k != "seconds"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--max-size", required=True)
    parser.add_argument("--choices", default="int8,int4,int3")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def started(name: str) -> subprocess.Popen[bytes]:
            (folder / name).mkdir(exist_ok=True)
            words = ["search", options.model, "--max-size", options.max_size, "--choices", options.choices, "-o", "found.yaml"]
            own = {"COMPRESS_CACHE": str(folder / f"cache-{name}")}
            return subprocess.Popen(
                [sys.executable, "-m", "compress.cli", *words],
                cwd=folder / name,
                env=os.environ | own,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

        begun = time.monotonic()
        code = started("whole").wait()
        seconds = time.monotonic() - begun
        print(f"uninterrupted: {seconds:.0f} s, exit code {code}", flush=True)
        killed = 0
        while killed < options.kills:
            process, after = started("killed"), draw.uniform(0.05, 0.6) * seconds
            time.sleep(after)
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            killed += 1
            print(f"killed after {after:.0f} s", flush=True)
        code = started("killed").wait()
        same = (folder / "whole/found.yaml").read_bytes() == (folder / "killed/found.yaml").read_bytes()
        why = without_seconds(folder / "whole/found.search.json") == without_seconds(folder / "killed/found.search.json")
        print(f"{killed} kills, then exit code {code}: the same recipe: {same}; the same reasons: {why}")


if __name__ == "__main__":
    main()
