"""Gives the command line broken and hostile inputs, and says how it took each.

    python tests/torture/bad_inputs.py --work FOLDER [--only CLASS[,CLASS]] [--case PART] [--all]

Prints a JSON line for each case that was not well taken (with `--all`: for each), then a count of each class. Exit code 1 where there is
any. `bad_support.py` says what well taken means.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
from pathlib import Path

import bad_data
import bad_models
import bad_recipes
import bad_results
import bad_variants
from bad_support import Case, prepare, take

CLASSES = {
    "recipe": bad_recipes.cases,
    "model": bad_models.cases,
    "data": bad_data.cases,
    "variant": bad_variants.cases,
    "results": bad_results.cases,
}
ROOT = Path(__file__).parents[2]


def all_cases(classes: list[str]) -> list[Case]:
    """The cases of some classes; of all where none is named."""
    return [case for name, cases in CLASSES.items() if not classes or name in classes for case in cases()]


def main() -> int:
    """Take the cases that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--only", default="", help=f"classes, comma-separated: {', '.join(CLASSES)}")
    parser.add_argument("--case", default="", help="part of the names of cases")
    parser.add_argument("--draw", type=int, help="take only so many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="print the answers to those that were well taken, too")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    record = json.loads(next((ROOT / "results").glob("int8-minilm-*/record.json")).read_text())
    prepare(work / "base")
    import transformers  # what is imported once is not imported by every case

    import compress.cli  # noqa: F401

    transformers.AutoModel, transformers.BertModel  # noqa: B018
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    chosen = [case for case in all_cases([part for part in arguments.only.split(",") if part]) if arguments.case in case.full_name]
    if arguments.draw is not None:
        chosen = random.Random(arguments.seed).sample(chosen, arguments.draw)
    wrong: dict[str, int] = {}
    for case in chosen:
        answer = take(case, work, record, floor)
        wrong[case.kind] = wrong.get(case.kind, 0) + bool(answer["faults"])
        if answer["faults"] or arguments.all:
            print(json.dumps(answer, ensure_ascii=False), flush=True)
    for kind, faulty in wrong.items():
        count = sum(case.kind == kind for case in chosen)
        print(f"{kind}: {count - faulty} of {count} well taken")
    return int(any(wrong.values()))


if __name__ == "__main__":
    sys.exit(main())
