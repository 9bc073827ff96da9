"""The table of quantized variants, from their records: score kept with its interval, size, speed.

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
from collections.abc import Callable
from pathlib import Path

from compress.measure.record import Record
from compress.reports.compare import line_of
from compress.reports.formats import COLUMNS

BITS = re.compile(r"([\d.]+) bits a weight")


def bits_of_layers(record: Record) -> str:
    """Return the bits per weight according to the steps."""
    return ", ".join(found.group(1) for step in record.steps if (found := BITS.search(step.note)))


def bits_of_all(record: Record) -> str:
    """Return the bits of the file per parameter of the baseline."""
    return f"{8 * record.row('variant').size_bytes / record.model.parameters:.2f}"


def from_line(column: str) -> Callable[[Record], str]:
    """Return what `compress compare` shows in a column."""
    return lambda record: COLUMNS[column](line_of(record))


CELLS: dict[str, Callable[[Record], str]] = {
    **{column: from_line(column) for column in ("recipe", "weights x activations")},
    "bits, linear": bits_of_layers,
    "bits, all": bits_of_all,
    **{column: from_line(column) for column in ("file", "kept", "95 % interval", "verdict")},
    "tasks regressed": lambda record: from_line("tasks regressed")(record) or "none",
    **{column: from_line(column) for column in ("cosine", "faster")},
}


def main() -> None:
    """Print the table, best first."""
    records = [Record.read(Path(folder)) for folder in sys.argv[1:]]
    print("| " + " | ".join(CELLS) + " |")
    print("|" + "---|" * len(CELLS))
    for record in sorted(records, key=lambda record: -(record.retained or 0)):
        print("| " + " | ".join(cell(record) for cell in CELLS.values()) + " |")


if __name__ == "__main__":
    main()
