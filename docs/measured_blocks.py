"""The blocks that `measured.py` writes into README and docs/: tables made from records and recipes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any

from measured_records import RESULTS, ROOT, StaleError, line, peers, present, raw, run_folder, training_minutes
from recipe_keys import recipe_keys
from rich.console import Console

from compress.measure.record import Record
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import read_recipe
from compress.reports.formats import COLUMNS
from compress.reports.terminal import WIDTH, print_record


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table; columns of numbers are aligned to the right."""
    numeric = [all(re.match(r"[\d.,]*\d|$|-", row[i]) for row in rows) for i in range(len(headings))]
    rule = ["---:" if right and i else "---" for i, right in enumerate(numeric)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def shown(run: str, *columns: str) -> list[str]:
    """Return a run's cells as `compress compare` writes them."""
    return [COLUMNS[column](line(run)) for column in columns]


def best_first(runs: Mapping[str, Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    """Sort runs by what they keep."""
    return sorted(runs.items(), key=lambda item: -present(line(item[0]).kept))


TAKE = (
    *("int8-openvino-minilm", "bf16-openvino-minilm", "int8-onnx-minilm", "int4-gptq-minilm", "int4-gptq-t4-minilm"),
    *("heal-int4-table-minilm", "slim-minilm", "heal-width-25-minilm", "width-25-minilm", "heal-depth-50-minilm"),
)
WITHOUT_A_FILE = {"int4-gptq-t4-minilm": ("a smaller file", "`int4-gptq` with `embeddings: {bits: 4}`")}
"""Runs of TAKE whose recipe is another one with a changed key: what they are for, and that change."""
README_TAKES = ("int8-openvino-minilm", "bf16-openvino-minilm", "int8-onnx-minilm", "int4-gptq-minilm", "slim-minilm")
NEED = "you need "


@cache
def recipes() -> dict[str, Recipe]:
    """Return the ready-made recipes by name."""
    return {path.stem: read_recipe(path) for path in sorted((ROOT / "recipes").glob("*.yaml"))}


def needed(run: str) -> tuple[str, str]:
    """Return what a run's recipe is for, by its own `take_when`, and its name."""
    if run in WITHOUT_A_FILE:
        return WITHOUT_A_FILE[run]
    recipe = recipes()[line(run).recipe]
    if not recipe.take_when.startswith(NEED):
        raise StaleError(f"take_when of recipes/{recipe.name}.yaml does not begin with {NEED!r}")
    trains = any(step.method == "distill" for step in recipe.methods)
    return recipe.take_when.removeprefix(NEED), f"`{recipe.name}`" + (" (trains)" if trains else "")


def take(runs: Sequence[str], columns: Sequence[str] = ("kept", "95 % interval", "file", "faster")) -> str:
    """Write which recipe to take for which need."""
    return table(("you need", "take", *columns), [[*needed(run), *shown(run, *columns)] for run in runs])


def sentence(words: str, *, capital: bool = True) -> str:
    """Return words as a sentence, or as the end of one. A first word such as `int8` stays as it is."""
    first = words.partition(" ")[0]
    return (words[:1].upper() if capital and first.isalpha() else words[:1]) + words[1:] + "."


def with_links(words: str, names: Collection[str], folder: str) -> str:
    """Return words in which each recipe's name in code is a link to its page in a folder."""
    return re.sub(r"`([\w-]+)`", lambda found: f"[{found[0]}]({folder}{found[1]}.md)" if found[1] in names else found[0], words)


def when() -> str:
    """Write when to take each recipe and when not, as the recipes say."""
    rows = [
        [with_links(words, recipes(), "recipes/") for words in (f"`{name}`", recipe.take_when, recipe.not_when)]
        for name, recipe in recipes().items()
    ]
    return table(("recipe", "take it when", "not when"), rows)


AS_THEY_ARE = (
    *("int8-openvino", "bf16-openvino", "int8-weights", "llm-int8", "int8-onnx", "int8", "int8-static", "fp8"),
    *("int4-gptq", "int4-onnx", "int4-awq", "nf4", "int4-rtn", "int3-gptq"),
)
QUANTIZED = {
    **{f"{name}-minilm": f"`{name}`" for name in AS_THEY_ARE},
    "int4-gptq-sym-minilm": "`int4-gptq`, symmetric, token table in float16",
    "int4-gptq-only-minilm": "`int4-gptq`, token table in float16",
    "int4-gptq-t4-minilm": "`int4-gptq`, token table in int4",
    "int4-rtn-asym-minilm": "`int4-rtn` with zero points and searched scales",
}
BITS = re.compile(r"([\d.]+) bits (?:a|per) weight")


def layer_bits(run: str) -> str:
    """Return the bits per weight of the linear layers, scales and zero points included, as the steps' notes say."""
    return ", ".join(found.group(1) for step in raw(run)["steps"] if (found := BITS.search(step["note"])))


def quantization() -> str:
    """Write what each quantized variant keeps and takes."""
    columns = ("file", "kept", "95 % interval", "verdict", "tasks regressed", "cosine", "faster")
    rows = []
    for run, label in best_first({run: [label] for run, label in QUANTIZED.items()}):
        bits = f"{8 * line(run).bytes / raw(run)['model']['parameters']:.2f}"
        rows.append([*label, *shown(run, "weights x activations"), layer_bits(run), bits, *shown(run, *columns)])
    return table(("recipe", "weights x activations", "bits, linear layers", "bits, whole model", *columns), rows)


LOW_BITS = "low-bits"
"""Folder under results/ of the runs of `benchmarks/low_bits.yaml` and `benchmarks/low_bits_rotated.yaml`."""


def low_bits_method(run: str) -> tuple[int, str]:
    """Return the bits of a run of `LOW_BITS` and how its layers are rounded, in words."""
    *before, rounding, _ = (step["config"] for step in raw(run)["steps"])
    words = f"`{rounding['method']}`"
    words += f", drift {rounding['drift']}" if rounding.get("drift") else ""
    words += ", searched scales" if rounding["method"] == "rtn" and rounding["search"] else ""
    return rounding["bits"], ("rotated, " if before else "") + words


def low_bits() -> str:
    """Write what ways of rounding keep at few bits, the token table in four; the seconds are those of the steps."""
    runs: dict[tuple[int, str], dict[str, str]] = {}
    for path in sorted((RESULTS / LOW_BITS).glob("*/record.json")):
        run = f"{LOW_BITS}/{path.parent.name}"
        runs.setdefault(low_bits_method(run), {})[raw(run)["model"]["name"]] = run
    models = sorted({model for found in runs.values() for model in found})
    rows = []
    for (bits, words), found in sorted(runs.items(), key=lambda item: -item[0][0]):
        some = next(iter(found.values()))
        cells = []
        for model in models:
            run = found.get(model)
            cells += ["", "", "", ""] if run is None else [*shown(run, "cosine", "kept", "95 % interval"), step_seconds(run)]
        rows.append([str(bits), words, layer_bits(some), *cells])
    headings = [f"{model}: {what}" for model in models for what in ("cosine", "kept", "95 % interval", "seconds")]
    return table(("bits", "rounding", "bits, linear layers", *headings), rows)


def step_seconds(run: str) -> str:
    """Return how long a run's steps took, in seconds."""
    return f"{sum(step['seconds'] for step in raw(run)['steps']):.0f}"


def single_weights() -> str:
    """Write what pruning single weights keeps."""
    columns = ("file", "kept", "95 % interval", "verdict", "cosine")
    names = [f"{method}-{share}-minilm" for method in ("sparsegpt", "wanda", "magnitude") for share in ("50", "4of8", "2of4")]
    rows = []
    for run, _ in best_first(dict.fromkeys(names, ())):
        config = raw(run)["steps"][0]["config"]
        zeros = config.get("pattern") or f"{config['sparsity']:.0%}".replace("%", " %")
        rows.append([f"`{config['method']}`", zeros, layer_bits(run), *shown(run, *columns)])
    return table(("method", "zeros", "bits, linear layers", *columns), rows)


PRUNED = (
    *(f"channels-{share}{kind}-minilm" for share in (25, 50) for kind in ("", "-activation", "-magnitude", "-plain")),
    *(f"width-{share}-error{kind}-minilm" for share in (25, 50) for kind in ("", "-plain")),
    *("attention-2-minilm", "mlp-2-minilm", "depth-1-minilm", "depth-2-minilm", "depth-2-angular-minilm", "depth-3-minilm"),
)


def pruned_as(run: str) -> str:
    """Say in words what a run pruned."""
    (step,) = raw(run)["steps"]
    config = step["config"]
    if config["method"] == "depth":
        dropped = ", ".join(map(str, config["drop"]))
        return f"{config['what']} {dropped} dropped (`{config['criterion']}`)"
    shares = " and ".join(f"{config[key]:.3g} of the {key}" for key in ("heads", "channels") if config[key] < 1)
    return f"{shares} kept (`{config['criterion']}`{'' if config['refit'] else ', no refit'})"


def pruned() -> str:
    """Write what dropping blocks, sublayers, heads and channels keeps."""
    columns = ("file", "kept", "95 % interval", "verdict", "cosine")
    rows = [[pruned_as(run), *shown(run, *columns)] for run, _ in best_first(dict.fromkeys(PRUNED, ()))]
    return table(("pruned", *columns), rows)


HEALED = {
    "heal-width-25-minilm": ("five eighths of the channels kept", "width-25-minilm"),
    "heal-depth-25-minilm": ("one of six blocks dropped", "depth-25-minilm"),
    "heal-depth-50-minilm": ("three of six blocks dropped", "depth-50-minilm"),
    "heal-2of4-minilm": ("two of every four weights zero (SparseGPT)", "sparsegpt-2of4-minilm"),
    "heal-int3-minilm": ("three bits (GPTQ), integers trained", "int3-gptq-minilm"),
    "heal-int4-table-minilm": ("four bits (GPTQ), token table too, integers trained", "int4-gptq-t4-minilm"),
    "slim-minilm": ("half the blocks, 3/4 of the channels, int4 table, static int8 in OpenVINO", None),
}
HEALED_NANO = {
    "heal-int4-table-nano": ("four bits, token table too, integers trained", None),
    "heal-int3-nano": ("three bits, integers trained", "int3-gptq-nano"),
    "heal-width-25-nano": ("five eighths of the channels kept", "width-25-nano"),
    "heal-depth-50-nano": ("two of four blocks dropped", "depth-50-nano"),
    "slim-nano": ("half the blocks, 3/4 of the channels, int4 table, static int8 in OpenVINO", None),
}


def healed(runs: Mapping[str, tuple[str, str | None]]) -> str:
    """Write what training gives back after pruning or quantizing."""
    rows = []
    for run, (what, before) in runs.items():
        start = shown(before, "kept")[0] if before else ""
        cells = shown(run, "kept", "95 % interval", "cosine", "faster")
        rows.append([f"`{line(run).recipe}`", what, *shown(run, "file"), start, *cells, f"{training_minutes(run):.1f} min"])
    columns = ("file", "kept before", "kept after", "95 % interval", "cosine", "faster", "training")
    return table(("recipe", "what is smaller", *columns), rows)


def peers_table(file: str) -> str:
    """Write our runs and other libraries side by side, slowest first."""
    from compress.common.memory import gigabytes

    rows = []
    for name, row in peers(file).items():
        kept = [] if row["kept"] is None else [f"{row['kept']:.2f} %"]
        digits = 1 if row["texts_per_second"] < 10 else 0
        sizes = (gigabytes(row["peak_bytes"]), gigabytes(row["weights_bytes"]))
        cells = [f"{row['texts_per_second']:.{digits}f}", f"{row['ratio']:.2f}x", f"{row['cosine_mean']:.5f}", *sizes]
        rows.append([name, *cells, *kept])
    columns = ["", "texts/s", "ratio", "cosine", "peak memory", "weights", "kept"]
    return table(columns[: len(rows[0])], rows)


ALIGNED = {"nano": "nano", "half-depth": "MiniLM without half of its blocks", "e5-small": "multilingual-e5-small"}
ALIGNED_BY = {"rotation": "rotation", "linear": "linear map", "trained": "{minutes:g} minutes of training"}


def aligned_record() -> dict[str, Any]:
    """Return the record of `benchmarks/align.py`."""
    found: dict[str, Any] = json.loads((RESULTS / "align" / "align.json").read_text(encoding="utf-8"))
    return found


def estimate(value: Mapping[str, float]) -> str:
    """Write a number with its interval, times 100."""
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}]"


def aligned() -> str:
    """Write what queries of other models find in MiniLM's index, by model, way of aligning and task."""
    record, rows = aligned_record(), []
    for model, ways in record["rows"].items():
        for way, found in ways.items():
            tasks = found["alignment"]["tasks"]
            best = found["found"].get("trained") or found["found"]["maps"][way]
            cells = [cell for task in tasks for cell in (estimate(task["new_on_old"]), f"{estimate(task['kept'])} %")]
            by = ALIGNED_BY[way].format(minutes=record["minutes"])
            rows.append([ALIGNED[model], by, f"{best['cosine_mean']:.3f}", f"{best['overlap_at_10']:.2f}", *cells])
    headings = [cell for name in aligned_tasks() for cell in (f"{name}: new on old", "kept")]
    return table(("queries by", "aligned by", "held-out cosine", "overlap@10", *headings), rows)


def aligned_tasks() -> list[str]:
    """Return the tasks of the record."""
    first = next(iter(next(iter(aligned_record()["rows"].values())).values()))
    return [task["task"] for task in first["alignment"]["tasks"]]


def aligned_anew() -> str:
    """Write what the models find in indexes of their own."""
    rows = []
    for model, ways in aligned_record()["rows"].items():
        tasks = next(iter(ways.values()))["alignment"]["tasks"]
        if not rows:
            rows.append(["MiniLM on its own index (old on old)", *(estimate(task["old_on_old"]) for task in tasks)])
        rows.append([f"{ALIGNED[model]} on an index of its own (new on new)", *(estimate(task["new_on_new"]) for task in tasks)])
    return table(("", *aligned_tasks()), rows)


STORES = {"faiss": "FAISS", "lancedb": "LanceDB", "qdrant_client": "Qdrant", "duckdb": "DuckDB"}


def vector_stores() -> str:
    """Write what vector stores find with vectors in fewer bits."""
    record = json.loads((RESULTS / "vector-stores" / "recall.json").read_text(encoding="utf-8"))
    formats = ("float32", "float16", "int8", "binary")
    rows = [
        [f"{STORES[name]} {record['stores'][name]}", *(f"{found[format]:.3f}" for format in formats)]
        for name, found in record["recall"].items()
    ]
    return table(("store", *formats), rows)


def demo() -> str:
    """Write what `make demo` prints of its record, shortened: scores, fidelity, speed and size."""
    console = Console(width=WIDTH, highlight=False, file=io.StringIO())
    print_record(Record.read(run_folder("int8-nano-59384ab0")), console)
    file = console.file
    assert isinstance(file, io.StringIO)
    parts = [part for part in re.split(r"\n\s*\n", file.getvalue()) if part.strip()]
    scores = next(part for part in parts if re.search(r"^ *task +metric", part, re.M))
    scores = scores[re.search(r"^ *task +metric", scores, re.M).start() :]  # type: ignore[union-attr]
    scores = re.sub(r", [\d,]+ more *\n.*", "", scores)  # how many more examples would tell: wraps
    mean_row = next(part for part in parts if part.split()[0] == "mean")
    agreement = re.split(", @100", next(part for part in parts if part.startswith("fidelity")))[0]
    speed = next(part for part in parts if "texts/s" in part)
    speed = speed[re.search(r"^ *texts/s", speed, re.M).start() :]  # type: ignore[union-attr]
    text = "\n\n".join(part.strip("\n") for part in (scores, mean_row, agreement, speed))
    lines = (re.sub(r"─+", lambda rule: "-" * min(len(rule[0]), 100), line.rstrip()) for line in text.splitlines())
    return "```text\n" + "\n".join(lines) + "\n```"


BLOCKS: Mapping[str, Callable[[], str]] = {
    "demo": demo,
    "take": lambda: take(README_TAKES),
    "choosing": lambda: take(TAKE, ("kept", "95 % interval", "file", "cosine", "faster", "p50 ms")),
    "when": when,
    "quantization": quantization,
    "low bits": low_bits,
    "single weights": single_weights,
    "pruned": pruned,
    "healed": lambda: healed(HEALED),
    "healed nano": lambda: healed(HEALED_NANO),
    "peers": lambda: peers_table("peers.json"),
    "peers mistral": lambda: peers_table("mistral-4-blocks.json"),
    "aligned": aligned,
    "aligned anew": aligned_anew,
    "vector stores": vector_stores,
    "recipe keys": recipe_keys,
}
"""The blocks by the name in their marker."""
