"""May another model search the index of MiniLM? Three models, three ways of aligning each, two retrieval tasks.

    python benchmarks/align.py --data MTEB --texts TEXTS.jsonl.gz --half RUN --e5 FOLDER
    python docs/measured.py                       # writes the tables of docs/align.md from the record

MTEB holds SciFact and LEMBQMSumRetrieval, laid out as docs/measurement.md says; TEXTS are in neither task (those that are get left
out). RUN is `compress run recipes/depth-50.yaml --model minilm --compress-only`; FOLDER holds multilingual-e5-small. Each row is
`compress align MODEL --to minilm` with `--map rotation`, `--map linear`, and `--train 5` after the better map. A row that the
record holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from compress.common.machine import machine, versions
from compress.pipeline.align import AlignOptions, align

TARGET = Path(__file__).resolve().parents[1] / "results" / "align" / "align.json"
TASKS = ("SciFact", "LEMBQMSumRetrieval")
OLD = "minilm"


def measured(model: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Align a model in one way and return what the record says."""
    how = {"map": way} if way != "trained" else {"minutes": options.minutes}
    asked = AlignOptions(texts=options.texts, count=options.count, tasks=TASKS, data=options.data, device="cpu", **how)
    with tempfile.TemporaryDirectory() as folder:
        record = align(model, OLD, Path(folder) / "run", asked)
        assert record.alignment is not None
        (step,) = record.steps
        return {
            "alignment": record.alignment.model_dump(mode="json"),
            "verdict": record.verdict,
            "seconds": step.seconds,
            "dimension": record.model.dimension,
            "parameters": record.model.parameters,
            "found": {key: value for key, value in step.found.items() if key != "curve"},
            "steps": int(step.found["curve"][-1]["step"]) if "curve" in step.found else None,
        }


def kept() -> dict[str, Any]:
    """Return what the record holds so far."""
    found: dict[str, Any] = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {"rows": {}}
    return found


def main(options: argparse.Namespace) -> None:
    """Measure what the record does not hold yet, and write it after each row: the training last, which takes longest."""
    models = {"nano": "nano", "half-depth": options.half, "e5-small": options.e5}
    for way in options.ways.split(","):
        for name, model in models.items():
            if model is None or way in kept()["rows"].get(name, {}):
                continue
            found = measured(model, way, options)
            print(f"{name} {way}: {found['verdict']} ({found['seconds']:.0f} s)", flush=True)
            record = kept()
            record["rows"].setdefault(name, {})[way] = found
            record |= {"old": OLD, "count": options.count, "minutes": options.minutes}
            record |= {"versions": versions(), "machine": machine(None).model_dump()}
            TARGET.parent.mkdir(parents=True, exist_ok=True)
            TARGET.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--texts", required=True)
    parser.add_argument("--half")
    parser.add_argument("--e5")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--ways", default="rotation,linear,trained")
    parser.add_argument("--minutes", type=float, default=5.0)
    main(parser.parse_args())
