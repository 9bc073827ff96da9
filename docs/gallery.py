"""Writes docs/recipes/: a page and two pictures for each recipe, and a page that lists them all.

    python docs/gallery.py            # writes what is not as it should be, and removes what no recipe has
    python docs/gallery.py --check    # lists what differs; exit code 1 if anything does

Words come from the recipes (`description`, `take_when`, `not_when`) and from the first paragraph of their methods' files, numbers
from the records that results/README.md lists. No model is computed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from measured_blocks import sentence, with_links
from measured_records import RESULTS, ROOT, StaleError

from compress.common.memory import gigabytes
from compress.measure.record import RECORD_FILE, Record, Row, Step, TaskRow
from compress.methods.base import Method
from compress.pipeline.recipe import Recipe
from compress.pipeline.recipe_file import parse_recipe, read_recipe
from compress.pipeline.rounds import Rounds
from compress.reports.compare import Group, Line, grouped, read_records
from compress.reports.formats import COLUMNS
from compress.reports.plot import Point
from compress.reports.standing import Standing, standing_svg

RECIPES, GALLERY = ROOT / "recipes", ROOT / "docs" / "recipes"
NO_BREAK = "\u00a0"
NUMBER = re.compile(rf"|[+-]?[\d.,]+(x|[ {NO_BREAK}](%|[KMG]B|s|min|h))?|[+-]?[\d.,]+[ {NO_BREAK}]to[ {NO_BREAK}][+-]?[\d.,]+")
"""A cell that is aligned to the right."""
KEPT = ("kept", "95 % interval", "file", "of half", "faster")
"""Columns of the first table, as `compress compare` names them."""
CAPTION = """\
Each dot is a record of the same model, tasks, machine and packages. Blue is this recipe, with the 95 % interval of what it keeps.
For dark ones, no other record keeps as much, is as small and as fast, and is better in one of these. Dashed lines are the unchanged
model: {baseline} for speed, half precision for size."""
MEMORY = "Records do not say how much memory that took; `compress plan` estimates it."
INDEX = """\
# Recipes, one by one: what does each do, and what did it cost?

A page for each file in `recipes/`: what it does, where it stands among the others, its scores with intervals, its speed, what
making it took, and the YAML. [Choosing](../choosing.md) says which to use, [recipes](../recipes.md) what a recipe can say.

For each model: share of the unchanged model's mean score, size of the file, throughput relative to the unchanged model in float32
on a CPU. Those that keep most come first. Intervals, tasks and machines are on the pages.

{table}

Written by `python docs/gallery.py` from the recipes and the records in [results/](../../results/README.md).
"""


# Records


@dataclass(frozen=True)
class Found:
    """A recipe's newest run in a group of comparable ones."""

    group: Group
    line: Line
    record: Record
    folder: str
    first: bool
    """Whether the group is the first of its model that has the recipe."""

    @property
    def title(self) -> str:
        """What it measured: the model, and the tasks where several records of the model have different ones."""
        if self.first:
            return self.record.model.name
        tasks = self.record.recipe["evaluate"]["tasks"]
        return f"{self.record.model.name} ({', '.join(tasks) if len(tasks) < 4 else f'{len(tasks)} tasks'})"

    @property
    def baseline(self) -> str:
        """Name of the baseline that `faster` refers to."""
        return next(iter(self.record.row("variant").speedup), "float32")


class Records:
    """The records that results/README.md lists, in groups of comparable runs."""

    def __init__(self, results: Path) -> None:
        listed = set(re.findall(r"\| ([^|]+) \|$", (results / "README.md").read_text(encoding="utf-8"), re.M))
        folders = [path.parent for path in sorted(results.glob(f"*/{RECORD_FILE}")) if path.parent.name in listed]
        self.by_folder, broken = read_records(folders)
        if broken:
            raise StaleError("; ".join(broken.values()))
        self.groups = grouped(self.by_folder.values())

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Names of the models; the one with the largest group of comparable runs comes first."""
        return tuple(dict.fromkeys(group.model for group in self.groups))

    def of(self, recipe: str) -> list[Found]:
        """Return a recipe's runs: the newest one of each group."""
        found, seen = [], set()
        by_run = {record.run: (folder.name, record) for folder, record in self.by_folder.items()}
        for group in sorted(self.groups, key=lambda group: self.models.index(group.model)):
            lines = [line for line in group.lines if line.recipe == recipe]
            if lines:
                newest = max(lines, key=lambda line: by_run[line.run][1].created)
                folder, record = by_run[newest.run]
                found.append(Found(group, newest, record, folder, first=group.model not in seen))
                seen.add(group.model)
        return found


def differences(recipe: Recipe, record: Record) -> str:
    """Return in which settings of its steps a record differs from the recipe's file; empty: in none."""
    then = parse_recipe(record.recipe, f"recipe of {record.run}")
    before, now = ([step for step in one.methods if step.method != "fold"] for one in (then, recipe))
    if any(isinstance(step, Rounds) for step in recipe.steps):
        return differences_in_rounds(before, now)
    if [step.method for step in before] != [step.method for step in now]:
        return "steps " + ", ".join(f"`{step.method}`" for step in before)
    found = [
        f"`{name}` of `{new.method}`: `{value}`"
        for old, new in zip(before, now, strict=True)
        for name, value in old.model_dump(mode="json").items()
        if value != new.model_dump(mode="json")[name]
    ]
    return ", ".join(found)


def differences_in_rounds(before: Sequence[Method], now: Sequence[Method]) -> str:
    """Return the same for a recipe with a group: the record has its steps round by round, some keys with a value for each."""
    if {step.method for step in before} != {step.method for step in now}:
        return "steps " + ", ".join(f"`{step.method}`" for step in before)
    written = {step.method: step.model_dump(mode="json") for step in now}
    found = [
        f"`{name}` of `{old.method}`: `{value}`"
        for old in before
        for name, value in old.model_dump(mode="json").items()
        if name not in old.spreads and value != written[old.method][name]
    ]
    return ", ".join(dict.fromkeys(found))


# Pictures


def standing(found: Found, against: str) -> Standing | None:
    """Return where a run stands against `speed` or `size`; None if it was not timed or not scored."""
    place, label = {
        "speed": (lambda line: line.speedup, f"throughput, times {found.baseline}'s"),
        "size": (lambda line: line.bytes / 1e6, "file, MB"),
    }[against]
    run = found.line
    x = place(run)
    if x is None or run.kept is None or len(found.group.lines) < 2:
        return None
    others = [
        Point(line.recipe, place(line), 100 * line.kept, line.optimal)
        for line in found.group.lines
        if line.run != run.run and line.kept is not None and place(line) is not None
    ]
    low, high = (100 * (run.kept if end is None else end) for end in (run.low, run.high))
    unchanged = 1.0 if against == "speed" else run.bytes / run.size / 1e6
    return Standing(found.title, label, Point(run.recipe, x, 100 * run.kept), low, high, others, unchanged)


def pictures(name: str, runs: Sequence[Found]) -> dict[str, str]:
    """Return the pictures of a recipe by file name: what it keeps against speed and against size, a panel a model."""
    drawn = {
        f"{name}-{against}.svg": [panel for found in runs if (panel := standing(found, against)) is not None]
        for against in ("speed", "size")
    }
    return {file: standing_svg(panels) for file, panels in drawn.items() if panels}


def pictured(name: str, runs: Sequence[Found], files: Mapping[str, str]) -> str:
    """Write the pictures into a page, each with its numbers for those who do not see it."""
    images = []
    for against, cell in (("speed", "faster"), ("size", "file")):
        if f"{name}-{against}.svg" in files:
            lines = [(found.title, found.line) for found in runs if standing(found, against) is not None]
            kept = (f"{COLUMNS['kept'](line)} ({COLUMNS['95 % interval'](line)}) at {COLUMNS[cell](line)}" for _, line in lines)
            said = "; ".join(f"{title} {words}" for (title, _), words in zip(lines, kept, strict=True))
            images.append(f"![Score kept against {against}: {said}]({name}-{against}.svg)")
    return "\n".join(images)


# Tables of a run


def unbroken(number: str) -> str:
    """Return a number or an interval such that no line ends inside it."""
    return number.replace(" ", NO_BREAK)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table in which no text is taken for markup of the table; columns of numbers are aligned to the right."""
    rows = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows]
    rows = [[unbroken(cell) if NUMBER.fullmatch(cell) else cell for cell in row] for row in rows]
    rule = ["---:" if all(NUMBER.fullmatch(row[i]) for row in rows) else "---" for i in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def duration(seconds: float) -> str:
    """Write a time for people."""
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def scores(tasks: Sequence[TaskRow]) -> str:
    """Write the score of each task before and after, and the interval of the difference."""
    rows = []
    for task in tasks:
        ends = task.interval
        interval = "" if ends is None else f"{100 * ends.low:+.2f} to {100 * ends.high:+.2f}"
        numbers = (f"{100 * task.baseline:.2f}", f"{100 * task.variant:.2f}", f"{100 * task.delta:+.2f}")
        rows.append([task.task, task.type, task.metric, *numbers, interval, task.verdict or ""])
    return table(("task", "type", "metric", "before", "after", "difference", "95 % interval", "verdict"), rows)


def speed(rows: Sequence[Row]) -> str | None:
    """Write throughput, latency and memory of the baselines and the variant, each in its runtime; None if nothing was timed."""
    timed = [row for row in rows if row.speed is not None]
    baselines = [row.name for row in timed if row.role == "baseline"]
    written = []
    for row in timed:
        assert row.speed is not None
        ratios = [f"{row.speedup[name]:.2f}x" if name in row.speedup else "" for name in baselines]
        peak = row.speed.gpu_peak_bytes if row.device != "cpu" else row.speed.peak_bytes
        latency = (f"{row.speed.latency_p50_ms:.1f}", f"{row.speed.latency_p99_ms:.1f}")
        memory = "" if peak is None else gigabytes(peak)
        name = "this recipe" if row.role == "variant" else f"unchanged, {row.compute}"
        written.append(
            [name, row.runtime, f"{row.speed.texts_per_second:,.0f}", *ratios, *latency, memory, gigabytes(row.size_bytes)]
        )
    over = (f"over {name}" for name in baselines)
    return table(("", "runtime", "texts/s", *over, "p50 ms", "p99 ms", "peak memory", "file"), written) if written else None


def seconds_of(step: Step) -> float:
    """Return how long a step took. A training that was continued says so in its curve, which counts the parts before as well."""
    return max([step.seconds, *(point["seconds"] for point in step.found.get("curve", ()))])


def total(record: Record) -> str:
    """Write how long all steps took."""
    return duration(sum(map(seconds_of, record.steps))) if record.steps else ""


def took(record: Record) -> list[str]:
    """Write which steps made the variant, what each did and how long it took."""
    if not record.steps:
        return ["Nothing was computed to make it: the recipe has no steps."]
    rows = [[f"`{step.config['method']}`", duration(seconds_of(step)), step.note] for step in record.steps]
    return [table(("step", "time", "what it did"), rows), MEMORY]


def measured_by(found: Found, recipe: Recipe) -> str:
    """Say which record the numbers are from, when and where they were measured, and with which other settings."""
    record, group = found.record, found.group
    differs = differences(recipe, record)
    packages = ", ".join(f"{name} {version}" for name, version in group.versions.items())
    said = f"[{found.folder}](../../results/{found.folder}/{RECORD_FILE}) of {record.created[:10]}: {group.machine}; {packages}."
    return said + (f" Settings other than those below: {differs}." if differs else "")


def details(found: Found, recipe: Recipe) -> list[str]:
    """Write everything on one run."""
    parts = [f"## {found.title}", measured_by(found, recipe), sentence(found.record.verdict)]
    if found.record.tasks:
        parts += ["### Scores", scores(found.record.tasks)]
    if found.record.fidelity is not None:
        near = found.record.fidelity
        cosine = "they have another width"
        if near.cosine_mean is not None:
            cosine = f"mean cosine {near.cosine_mean:.4f}, lowest {near.cosine_min:.4f}"
        same = f"{unbroken(f'{100 * near.overlap_at_10:.1f} %')} of each text's ten nearest neighbours are the same"
        parts.append(f"Vectors against the unchanged model's, on {near.texts} texts: {cosine}; {same}.")
    timed = speed(found.record.rows)
    if timed is not None:
        parts += ["### Speed and memory", f"Timed on {found.record.measured_on}.", timed]
    return [*parts, "### What making it took", *took(found.record)]


# Pages


def sentences(recipe: Recipe) -> list[str]:
    """Say what a recipe does: in its own words, then each step in those of its method's file."""
    steps = listed(recipe.steps)
    return [sentence(recipe.description), *(["\n".join(steps)] if steps else [])]


def listed(steps: Sequence[Method | Rounds]) -> list[str]:
    """Say what each step does, as items of a list; those of a group are a list in its item."""
    items = []
    for number, step in enumerate(steps, start=1):
        items.append(f"{number}. [`{step.method}`](../recipes.md#{step.method}): {about(step)}")
        items += [f"    {item}" for item in listed(step.steps)] if isinstance(step, Rounds) else []
    return items


def about(step: Method | Rounds) -> str:
    """Return the first paragraph of the file of a step's method."""
    said = sys.modules[type(step).__module__].__doc__ or ""
    return " ".join(said.partition("\n\n")[0].split())


def page(path: Path, names: Sequence[str], records: Records) -> dict[str, str]:
    """Return the page of a recipe and its pictures, by file name."""
    recipe, name = read_recipe(path), path.stem
    runs = records.of(name)
    files = pictures(name, runs)
    parts = [f"# {name}", *sentences(recipe)]
    for start, key in (("Take it when", "take_when"), ("Not when", "not_when")):
        words = getattr(recipe, key)
        if not words:
            raise StaleError(f"recipes/{path.name} does not say {key}")
        parts.append(f"**{start}** {with_links(sentence(words, capital=False), names, '')}")
    parts += [f"    compress run recipes/{path.name} --model ./my-model", "## Where it stands"]
    if runs:
        rows = [[found.title, *(COLUMNS[column](found.line) for column in KEPT), total(found.record)] for found in runs]
        parts.append(table(("model", *KEPT, "making it took"), rows))
        parts += [pictured(name, runs, files), CAPTION.format(baseline=runs[0].baseline)] if files else []
    else:
        parts.append("**There is no record of this recipe**: nothing here was measured with it.")
    for found in runs:
        parts += details(found, recipe)
    parts += ["## The recipe", f"```yaml\n{path.read_text(encoding='utf-8').strip()}\n```"]
    parts.append(
        "[All recipes](index.md). Words from the recipe and its methods, numbers from the records: `python docs/gallery.py`."
    )
    return {f"{name}.md": "\n\n".join(parts) + "\n", **files}


def index(paths: Sequence[Path], records: Records) -> str:
    """Return the page that lists all recipes; those that keep most of the first model come first."""
    names = [path.stem for path in paths]
    kept, rows = {}, {}
    for path in paths:
        runs = {found.record.model.name: found.line for found in records.of(path.stem) if found.first}
        row = [f"[`{path.stem}`]({path.stem}.md)"]
        row += [_at_a_glance(runs[model]) if model in runs else "no record" for model in records.models]
        rows[path.stem] = [*row, with_links(read_recipe(path).take_when, names, "")]
        first = runs.get(records.models[0])
        kept[path.stem] = -1.0 if first is None or first.kept is None else first.kept
    ordered = sorted(names, key=lambda name: (-kept[name], name))
    listed = table(("recipe", *records.models, "take it when"), [rows[name] for name in ordered])
    return INDEX.format(table=listed)


def _at_a_glance(line: Line) -> str:
    return ", ".join(unbroken(cell) for cell in (COLUMNS[column](line) for column in ("kept", "file", "faster")) if cell)


def gallery(recipes: Path = RECIPES, results: Path = RESULTS) -> dict[str, str]:
    """Return every file of docs/recipes/ by name.

    Raises:
        StaleError: a record cannot be read, or a recipe lacks its words.
    """
    paths, records = sorted(recipes.glob("*.yaml")), Records(results)
    names = [path.stem for path in paths]
    files = {"index.md": index(paths, records)}
    for path in paths:
        files |= page(path, names, records)
    return files


def faults(files: Mapping[str, str], folder: Path = GALLERY) -> Iterator[str]:
    """Yield what is not in a folder as it should be, by file."""
    there = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*")} if folder.is_dir() else {}
    for name in sorted(files.keys() | there.keys()):
        if name not in files:
            yield f"{name}: no recipe has it"
        elif name not in there:
            yield f"{name}: is missing"
        elif files[name] != there[name]:
            yield f"{name}: is not what recipes and records say"


def write(files: Mapping[str, str], folder: Path = GALLERY) -> None:
    """Write what differs and remove what no recipe has."""
    folder.mkdir(parents=True, exist_ok=True)
    for fault in list(faults(files, folder)):
        path = folder / fault.partition(":")[0]
        if path.name in files:
            path.write_text(files[path.name], encoding="utf-8")
        else:
            path.unlink()
        print(f"written: {path.name}" if path.name in files else f"removed: {path.name}")


def main() -> None:
    """Write the gallery, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; list what differs")
    arguments = parser.parse_args()
    try:
        files = gallery()
    except StaleError as error:
        sys.exit(str(error))
    if not arguments.check:
        write(files)
    wrong = [f"docs/recipes/{fault}: python docs/gallery.py writes it" for fault in faults(files)]
    print("\n".join(wrong), file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
