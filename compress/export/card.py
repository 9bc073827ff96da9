"""The card of an export: licence, how to load it, measured accuracy and speed, recipe, and checksums of the files."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from compress.export.reader import Reader
from compress.measure.record import RECORD_FILE, Record
from compress.models.files.variant import VariantInfo
from compress.models.source import PUBLISHED

CHUNK = 1 << 20
CARD_FILE, EXAMPLE_FILE = "README.md", "example.py"


def record_of(variant: Path) -> Record | None:
    """Return the record of the run that a variant belongs to; None where the variant's folder is not in a run's folder."""
    return Record.read(variant.parent) if (variant.parent / RECORD_FILE).exists() else None


def card(info: VariantInfo, reader: Reader, prompt: str, read_back: str, record: Record | None, folder: Path) -> str:
    """Return the card of an export, Markdown.

    Args:
        info: the variant.
        reader: what loads it.
        prompt: prompt that the example puts before its texts.
        read_back: result of reading the export back, in a sentence.
        record: record of the run that made the variant; without one the card has no scores.
        folder: the export's folder.
    """
    info = info.model_copy(update={"base": PUBLISHED.get(info.base, info.base)})
    title = f"{info.base}: weights {info.weights}, activations {info.activations}"
    parts = ["\n".join(_front(info, reader)), f"# {title}", *_warnings(info), _use(reader, prompt), read_back, *reader.notes]
    if record is not None:
        parts += [*_accuracy(record), *_speed(record), _recipe(record)]
    return "\n\n".join([*parts, "\n".join(_files(folder))]) + "\n"


def _front(info: VariantInfo, reader: Reader) -> Iterator[str]:
    yield "---"
    if info.licence:
        yield f"license: {json.dumps(info.licence)}"
    yield f"library_name: {reader.library}"
    yield "pipeline_tag: sentence-similarity"
    if "/" in info.base:
        yield f"base_model: {info.base}"
        yield f"base_model_relation: {'quantized' if info.quantized else 'finetune'}"
    yield "---"


def _warnings(info: VariantInfo) -> Iterator[str]:
    if not info.pretrained:
        yield "Made from random weights to measure speed and memory; its vectors mean nothing."
    if info.licence:
        yield f"The licence of {info.base}, {info.licence}, also applies to this model."
    else:
        yield f"The files of {info.base} name no licence; the licence of that model also applies to this one."


def example(reader: Reader, prompt: str) -> str:
    """Return a program that embeds two texts with a reader; it is run in the export's folder."""
    call = f'embed(["any", "texts"]{f", {json.dumps(prompt, ensure_ascii=False)}" if prompt else ""})'
    return f"{reader.example}\nvectors = {call}\nprint(vectors.shape)\n"


def _use(reader: Reader, prompt: str) -> str:
    install = f"`pip install {' '.join(reader.packages)}` installs all that is needed. In this folder (`{EXAMPLE_FILE}`):"
    return f"## Use\n\n{install}\n\n```python\n{example(reader, prompt)}```"


def _accuracy(record: Record) -> Iterator[str]:
    if not record.tasks:
        return
    yield f"## Accuracy\n\nAgainst {record.model.name} in {record.baseline}. Scores x 100."
    rows = ["| task | metric | before | this | difference | 95 % interval | verdict |", "|---|---|---|---|---|---|---|"]
    for task in record.tasks:
        scores = f"{100 * task.baseline:.2f} | {100 * task.variant:.2f} | {100 * task.delta:+.2f}"
        rows.append(f"| {task.task} | {task.metric} | {scores} | {task.interval or '-'} | {task.verdict or '-'} |")
    yield "\n".join(rows)
    yield f"Verdict: {record.verdict}."
    fidelity = record.fidelity
    if fidelity is not None and fidelity.cosine_mean is not None:
        cosine, overlap = f"{fidelity.cosine_mean:.5f}", f"{100 * fidelity.overlap_at_10:.1f} %"
        yield f"Mean cosine to the vectors before: {cosine} on {fidelity.texts} texts; of ten neighbours {overlap} are the same."


def _speed(record: Record) -> Iterator[str]:
    if all(row.speed is None for row in record.rows):
        return
    machine = record.machine
    where = machine.gpu or f"{machine.cpu}, {machine.cores} cores"
    yield f"## Speed and memory\n\nMeasured for the variant, in the runtime named: {record.measured_on}; {where}."
    rows = ["| | runtime | texts/s | p50 ms | peak memory | on disk |", "|---|---|---|---|---|---|"]
    for row in record.rows:
        name = f"before, {row.compute}" if row.role == "baseline" else "this"
        speed = row.speed
        shown = "- | - | -"
        if speed is not None:
            peak = speed.gpu_peak_bytes if machine.gpu else speed.peak_bytes
            memory = f"{peak / 1e6:,.0f} MB" if peak is not None else "-"
            shown = f"{speed.texts_per_second:,.0f} | {speed.latency_p50_ms:.1f} | {memory}"
        rows.append(f"| {name} | {row.runtime} | {shown} | {row.size_bytes / 1e6:,.1f} MB |")
    yield "\n".join(rows)
    installed = [f"{name} {version}" for name, version in record.versions.items() if version != "not installed"]
    yield f"Versions: {', '.join(installed)}."


def _recipe(record: Record) -> str:
    text = io.StringIO()
    YAML().dump(record.recipe, text)
    return f"## Recipe\n\nRun `{record.run}` of {record.created}:\n\n```yaml\n{text.getvalue()}```"


def _files(folder: Path) -> Iterator[str]:
    yield "## Files\n\n| file | bytes | SHA-256 |\n|---|---|---|"
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD_FILE):
        yield f"| {path.relative_to(folder).as_posix()} | {path.stat().st_size:,} | `{_checksum(path)}` |"


def _checksum(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
