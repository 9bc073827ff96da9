"""The README's table of quantized variants, from their records: what each keeps, with its interval, and what it takes.

    compress run recipes/int8.yaml --data FOLDER --tasks STSBenchmark,STS12,SICK-R,BIOSSES,Banking77Classification,SciFact
    ...
    python benchmarks/quantization_table.py results/*-minilm-*

Kept: mean of the main scores over the baseline's mean. Its interval: the mean difference's, over the baseline's mean. Bits: of the
blocks' linear layers, scales and zeros counted, as the run's own step says; and of the whole model, from the size of its file.
Faster: throughput over our own float32 in the same run; empty where the run did not measure speed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from compress.compare import line_of
from compress.record import Record

BITS = re.compile(r"([\d.]+) bits a weight")


def row(record: Record) -> str:
    """Return a record's row of the table."""
    assert record.overall is not None
    assert record.retained is not None
    assert record.fidelity is not None
    line = line_of(record)
    assert line.low is not None
    assert line.high is not None
    bits = [found.group(1) for step in record.steps if (found := BITS.search(step.note))]
    variant = record.row("variant")
    cells = [
        str(record.recipe["name"]),
        f"{variant.weights} x {variant.activations}",
        ", ".join(bits),
        f"{8 * variant.size_bytes / record.model.parameters:.2f}",
        f"{variant.size_bytes / 1e6:.1f} MB",
        f"{100 * record.retained:.2f} %",
        f"{100 * line.low:.2f} to {100 * line.high:.2f}",
        str(record.overall.verdict),
        ", ".join(line.regressed) or "none",
        f"{record.fidelity['cosine_mean']:.4f}",
        "" if line.speedup is None else f"{line.speedup:.2f}x",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, the best first."""
    records = [Record.read(Path(folder)) for folder in sys.argv[1:]]
    headings = ("recipe", "weights x activations", "bits, linear", "bits, all", "file", "kept", "95 % interval", "verdict",
                "tasks regressed", "cosine", "faster")  # fmt: skip
    print("| " + " | ".join(headings) + " |")
    print("|" + "---|" * len(headings))
    for record in sorted(records, key=lambda record: -(record.retained or 0)):
        print(row(record))


if __name__ == "__main__":
    main()
