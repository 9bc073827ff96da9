"""Every format of `compress export` for the two embedded models: read back by its library, or the reason for a refusal.

    python benchmarks/exports.py
    python benchmarks/exports.py --formats onnx,gptq --environments FOLDER

Weights are rounded to four bits in groups of 64. NV-Embed's head stays where the format holds it; elsewhere the head is left out
(`mean_pooling`), which changes the vectors and is said in the table. Exit code 1 where vectors differ.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

from environments import add_environments_option, python_of
from readback import OF_COMPRESSED, OF_GPTQMODEL

from compress.common.errors import UserError
from compress.common.journal import Journal
from compress.export import FORMATS, export
from compress.methods.base import Method
from compress.methods.nv_embed.mean_pooling import MeanPooling
from compress.methods.prune.depth import Depth
from compress.methods.quantize.embeddings import Embeddings
from compress.methods.quantize.rtn import RTN
from compress.models.source import find
from compress.pipeline.apply import make_variant
from compress.pipeline.stage import BuildOptions

OF_LLAMA = ("llama-cpp-python==0.3.36", "numpy>=2")
ENVIRONMENTS = {
    "gptq": partial(python_of, "gptqmodel", OF_GPTQMODEL),
    "compressed-tensors": partial(python_of, "compressed-tensors", OF_COMPRESSED),
    "gguf": partial(python_of, "llama-cpp-python", OF_LLAMA, torch=False),
}
FOUR: tuple[Method, ...] = (RTN(bits=4, group_size=64, activations="none"),)
GRAPH: tuple[Method, ...] = (*FOUR, Embeddings(bits=8))
CASES: dict[str, dict[str, tuple[Method, ...]]] = {
    "minilm": {"int4": FOUR, "int4, int8 table": GRAPH, "a block less": (Depth(drop=(2,)),)},
    "nano": {
        "int4": FOUR,
        "int4, int8 table": GRAPH,
        "int4, head left out": (MeanPooling(), *FOUR),
        "a block less": (Depth(drop=(2,)),),
    },
}
LOWEST = re.compile(r"Read back with (.*): lowest cosine ([\d.]+)")


def outcome(variant: Path, format: str, target: Path, environments: Path) -> str:
    """Export, and return the outcome."""
    python = ENVIRONMENTS[format](root=environments) if format in ENVIRONMENTS else Path(sys.executable)
    said: list[str] = []
    try:
        export(variant, format, target, said.append, python=python)
    except UserError as error:
        return f"refused: {error.message}"
    found = LOWEST.match(said[-1])
    return f"{found[2]} ({found[1]})" if found else said[-1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_environments_option(parser)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--models", default=",".join(CASES))
    arguments = parser.parse_args()
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
    differs = False
    print("| model | variant | format | lowest cosine, read by |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for model in arguments.models.split(","):
            source = find(model)
            for case, steps in CASES[model].items():
                place = work / model / case.replace(", ", "-").replace(" ", "-")
                place.mkdir(parents=True)
                shape = source.shape
                options = BuildOptions("0", lambda _: None)
                make_variant(source, shape, list(steps), place / "variant", Journal(place / "journal"), options)
                for format in arguments.formats.split(","):
                    found = outcome(place, format, place / format, arguments.environments)
                    differs |= "gives other vectors" in found
                    print(f"| {model} | {case} | {format} | {found} |", flush=True)
    if differs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
