"""Measures a GPU: one JSON line a row, the most important first, each on the disk before the next begins.

    python benchmarks/gpu/rows.py --to results/gpu/h100.jsonl              # everything, some eight minutes on an H100
    python benchmarks/gpu/rows.py --to FILE --only products,equal_lengths  # some rows
    python benchmarks/gpu/rows.py --to FILE --device cpu --small           # every row's code, tiny, on a CPU

A row that fails is a line that says why, and the next one runs. `--seconds` bounds the whole: a row that runs then is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]  # these, benchmarks/, and the package where it is not installed

import nv_embed_rows  # noqa: E402
import other_rows  # noqa: E402
import torch  # noqa: E402
from nv_embed_rows import Bench, Row  # noqa: E402

from compress.common.card import read_card  # noqa: E402

ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "products": nv_embed_rows.products,
    "equal_lengths": nv_embed_rows.equal_lengths,
    "correctness": other_rows.correctness,
    "real_lengths": nv_embed_rows.real_lengths,
    "one_query": nv_embed_rows.one_query,
    "published": nv_embed_rows.published,
    "padding": nv_embed_rows.padding,
    "text_to_vector": nv_embed_rows.text_to_vector,
    "small_encoder": other_rows.small_encoder,
    "compressing": other_rows.compressing,
    "training": other_rows.training,
    "sparse_products": nv_embed_rows.sparse_products,
    "bitsandbytes": nv_embed_rows.bitsandbytes,
    "gptq_kernels": other_rows.gptq_kernels,
}
"""Most important first."""
PACKAGES = ("torch", "transformers", "triton", "bitsandbytes", "gptqmodel", "sentence-transformers", "numpy")


def installed() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write(path: Path, row: Row) -> None:
    """Add a row to the file and sync it, so that whatever stops the run loses only what comes after."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


class Stopped(Exception):
    """A row was stopped: none of the kinds that trials of kernels catch."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Stop what runs after so many seconds.

    Raises:
        Stopped: the time is over.
    """

    def stop(*_: object) -> None:
        raise Stopped(f"stopped after {seconds:.0f} s, when the time was over")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(bench: Bench, names: list[str], path: Path, limit: float) -> int:
    """Measure rows and return how many failed."""
    began, failed = time.monotonic(), 0
    for name in names:
        if time.monotonic() - began > limit:
            write(path, {"row": name, "skipped": f"the {limit:g} s were over"})
            continue
        started = time.monotonic()
        try:
            with at_most(max(1e-3, began + limit - started)):
                for row in ROWS[name](bench):
                    card = read_card()
                    line: dict[str, Any] = {"row": name, **row, "card": None if card is None else card.model_dump()}
                    write(path, line | {"at": round(time.monotonic() - began, 1)})
                    print(json.dumps({key: value for key, value in line.items() if key not in ("seconds", "card")}), flush=True)
        except Exception as error:  # whatever it is, the rows after it are wanted
            failed += 1
            place = traceback.format_exc(limit=-3)
            write(path, {"row": name, "failed": f"{type(error).__name__}: {error}"[:400], "place": place[-1500:]})
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        print(f"# {name}: {time.monotonic() - started:.1f} s", flush=True)
    return failed


def main() -> int:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="file to write, a JSON line a row; it is replaced")
    parser.add_argument("--only", default=",".join(ROWS), help=f"rows, out of {', '.join(ROWS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--seconds", type=float, default=480, help="no row begins after so many seconds")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = sorted(set(names) - set(ROWS))
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"this torch ({torch.__version__}) sees no GPU; --device cpu --small tries the code")
    arguments.to.parent.mkdir(parents=True, exist_ok=True)
    arguments.to.write_text("", encoding="utf-8")
    head = {
        "row": "machine",
        "command": shlex.join(sys.argv),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "versions": installed(),
        "python": platform.python_version(),
        "small": arguments.small,
        "date": time.strftime("%Y-%m-%d"),
    }
    write(arguments.to, head)
    return int(measure(Bench(device, arguments.small), names, arguments.to, arguments.seconds) > 0)


if __name__ == "__main__":
    sys.exit(main())
