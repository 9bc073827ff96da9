"""Say what to do next with the runs of a folder: three commands with their real paths, and the page's address. For `make demo`.

python examples/what_next.py runs [report.html]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from compress.measure.record import Record
from compress.reports.compare import line_of, read_records

RECIPES = Path(__file__).parents[1] / "recipes"
MODEL = "minilm"
"""A model that `make demo` installs, so that the command runs as it stands; a folder or a hub name takes its place."""
LAYOUTS = {"torch": "sentence-transformers", "onnxruntime": "onnx", "openvino": "openvino", "numpy": "model2vec", "gptq": "gptq"}
"""What `compress export` writes of a run, by its runtime."""


def near(path: Path) -> Path:
    """Return a path as it is typed from here, where it lies below."""
    whole = path.absolute()
    return whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else path


def fastest(records: Mapping[Path, Record]) -> Path:
    """Return the run with the highest throughput; of runs that were not timed, the one that keeps most."""
    lines = {folder: line_of(record) for folder, record in records.items()}
    return max(lines, key=lambda folder: (lines[folder].speedup or 0.0, lines[folder].kept or 0.0))


def commands(runs: Path) -> dict[str, list[str]]:
    """Return what can be done next, by what it is for, each as the words of a command.

    Raises:
        UserError: the folder has no readable run.
    """
    records, _ = read_records([runs])
    quick = fastest(records)
    recipe = RECIPES / f"{records[quick].recipe['name']}.yaml"
    known = recipe if recipe.exists() else RECIPES / "int8.yaml"
    layout = LAYOUTS[records[quick].row("variant").runtime]
    return {
        "Serve the fastest of them behind OpenAI's protocol": ["serve", str(near(quick))],
        "Take it elsewhere": ["export", str(near(quick)), "--format", layout, "--to", f"exported/{quick.name}"],
        "The same for another model, such as a folder of yours": ["run", str(near(known)), "--model", MODEL, "--runs", str(runs)],
    }


def main(runs: Path, page: Path | None = None) -> None:
    """Print the commands, and the page's address."""
    program = near(Path(sys.executable).parent / "compress")
    print("\nWhat next\n")
    for what, words in commands(runs).items():
        print(f"  {what}:\n      {program} {' '.join(words)}\n")
    if page is not None:
        print(f"  Every number of these runs, in a browser:\n      {page.resolve().as_uri()}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
