"""What a search is worth: how far its sums of scores can be trusted, and its mixture of bits next to uniform bits of the same size.

    python benchmarks/search.py minilm --bits 3.5 3 --to FOLDER
    python benchmarks/search.py nano --bits 3.5 3 --free-table --to FOLDER

Uniform is GPTQ in groups of 64 in all linear layers, with the token table in int8; 3.5 is 3 and 4 bits in alternate blocks. The
search gets as many bytes as that variant takes, the same method and groups, and the same calibration texts. Losses are
1 - cosine on held-out texts. FOLDER gets both recipes of each size, to be run on tasks.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from compress.models.folder import ModelFolder
from compress.search.budget import Bounds, SearchOptions, maker_of, search, write_found
from compress.search.choices import AS_STORED
from compress.search.groups import TABLE, WHOLE
from compress.search.sensitivity import SensitivityOptions, Subject, sensitivity_of

BITS = ("int2", "int3", "int4", "int5", "int6", "int8")


def uniform(subject: Subject, bits: float) -> dict[str, str]:
    """The choices of uniform bits: a half means one bit more in every other block."""
    found = {}
    for group in subject.choices:
        if group.kind == TABLE:
            found[group.name] = "int8"
        elif group.kind == WHOLE or group.block is None:
            found[group.name] = AS_STORED
        else:
            found[group.name] = f"int{int(bits) + (1 if bits % 1 and group.block % 2 else 0)}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.5, 3])
    parser.add_argument("--choices", default=",".join(BITS))
    parser.add_argument("--texts", default="embedded", help="as `calibration.texts` of a recipe")
    parser.add_argument("--count", type=int, default=384)
    parser.add_argument("--scored", type=int, default=64)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--free-table", action="store_true", help="search the table's bits as well")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    options.to.mkdir(parents=True, exist_ok=True)
    say = partial(print, flush=True)
    scoring = SensitivityOptions(
        choices=tuple(options.choices.split(",")), per="layer", texts=options.texts, count=options.count, scored=options.scored
    )
    subject = Subject(options.model, scoring, lambda _: None)
    begun = time.monotonic()
    record = sensitivity_of(subject)
    say(f"sensitivity: {record.seconds:.0f} s ({time.monotonic() - begun:.0f} s now)")
    maker = maker_of(subject)
    how = SearchOptions(scoring=scoring, trials=options.trials, table=options.free_table)
    for bits in options.bits:
        chosen = uniform(subject, bits)
        loss = maker.loss(chosen, keep=True)
        size = ModelFolder("uniform", maker.variant(chosen)).shape.file_bytes
        maker.forget(chosen)
        begun = time.monotonic()
        found = search(options.model, Bounds(max_bytes=size), replace(how, name=f"searched-{bits:g}"), lambda _: None)
        measured, trust = found.why["measured"], found.why["additivity"]
        write_found(found, options.to / f"searched-{bits:g}.yaml")
        say(f"{bits:g} bits, {size / 1e6:.2f} MB: uniform {loss:.5f}; searched {measured:.5f} in {found.why['bytes'] / 1e6:.2f} MB")
        say(f"  {measured / loss:.2f} of uniform, predicted {found.why['predicted']:.5f}; {time.monotonic() - begun:.0f} s")
        say(f"  R2 {trust['r2']:.3f}, with a slope of {trust['slope']:.2f} {trust['r2_fitted']:.3f}")


if __name__ == "__main__":
    main()
