"""What works with each layout: loaded, streamed, compressed, run by each runtime, exported. One cell is a number or a refusal's line.

`make test-models` fills the table of docs/models.md with it. `python tests/layouts/matrix.py NAME ...` prints rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tiny_layouts
import torch
from tests_support import compress_to, folder_of

import compress
from compress.common.errors import UserError
from compress.export import export
from compress.methods.base import Method
from compress.methods.prune.depth import Depth
from compress.methods.prune.width import Width
from compress.methods.quantize.gptq import GPTQ
from compress.methods.quantize.rtn import RTN
from compress.runtimes.lower import lower

Vectors = npt.NDArray[np.float32]
ROOT = Path(__file__).parents[2]
ROWS, PAGE = ROOT / "build" / "layouts", ROOT / "docs" / "models.md"
BEGIN, END = "<!-- layouts, by: make test-models -->", "<!-- end of layouts -->"
TEXTS = [
    "",
    "a",
    "The parcel never came.",
    "rain by the evening " * 40,
    "日本語の文章です。 emoji 🙂",
    "Who wrote IT ΣΑΣ? [CLS] <s>",
    "one two three four five six seven eight nine ten eleven twelve",
]
TOO_LONG = ("bert_length_beyond", "xlm_roberta_no_length")
"""Layouts whose settings allow more tokens than the network has positions for; sentence-transformers fails on such texts."""
NO_EMPTY_TEXT = ("gpt2_weighted",)
"""Layouts whose tokenizer adds nothing to an empty text, on which sentence-transformers fails."""
REFERENCES = {"nomic_bert_hub_config": "nomic_bert_mean"}
"""Layouts that sentence-transformers does not load without remote code, and the one that holds the same model as it does load it."""
SAME, SAME_GRAPH, INT8_COSINE = 1e-5, 1e-4, 0.99
"""The bars: of loading, streaming and exports; of graph runtimes; of int8's lowest cosine, where trained networks keep 0.999: random
weights have no redundancy, and outliers as large as their rounding."""


def reference(folder: Path, texts: Sequence[str], prompt: str | None = None) -> Vectors:
    """The vectors of sentence-transformers, one text at a time: padding to the left is not what is compared here."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    return np.stack([np.asarray(model.encode([text], prompt=prompt), dtype=np.float32)[0] for text in texts])


def difference(made: Vectors, expected: Vectors) -> float:
    """The largest difference of two sets of vectors, relative to the largest number in them."""
    return float(np.abs(made - expected).max() / np.abs(expected).max()) if made.shape == expected.shape else float("inf")


def lowest_cosine(made: Vectors, expected: Vectors) -> float:
    """The lowest cosine of two sets of vectors; zero vectors, which have none, are left out."""
    norms = np.linalg.norm(made, axis=1) * np.linalg.norm(expected, axis=1)
    kept = norms > 0
    return float(((made * expected).sum(axis=1)[kept] / norms[kept]).min())


@dataclass
class Layout:
    """A layout's folder, and what has been made of it."""

    folder: Path
    scratch: Path
    texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        texts = [text for text in TEXTS if self.folder.name not in TOO_LONG or len(text) < 100]
        self.texts = [text for text in texts if text or self.folder.name not in NO_EMPTY_TEXT]

    def encoded(self, folder: Path, **how: object) -> Vectors:
        """The vectors of a folder."""
        return compress.load(str(folder), device="cpu", **how).encode(self.texts)  # type: ignore[arg-type]

    def variant(self, name: str, *steps: Method) -> Path:
        """The folder of a variant, which is written once."""
        target = self.scratch / name
        if not target.exists():
            for step in steps:  # as a run plans before it starts
                try:
                    step.estimate(folder_of(self.folder).shape)
                except ValueError as error:
                    raise UserError(str(error)) from error
            compress_to(self.folder, target, *steps, max_tokens=64)
        return target

    @property
    def whole(self) -> Path:
        """The variant of no steps: the model in half precision."""
        return self.variant("half")


def expected(layout: Layout) -> Vectors:
    """The vectors of sentence-transformers for a layout."""
    other = REFERENCES.get(layout.folder.name)
    if other is None:
        return reference(layout.folder, layout.texts)
    failed = tiny_layouts.make(layout.scratch, [other])
    assert not failed, failed
    return reference(layout.scratch / other, layout.texts)


def load(layout: Layout) -> tuple[float, bool]:
    """The difference to sentence-transformers."""
    found = difference(layout.encoded(layout.folder), expected(layout))
    return found, found <= SAME


def stream(layout: Layout) -> tuple[float, bool]:
    """The same, with the network read block by block."""
    found = difference(layout.encoded(layout.folder, stream=True), expected(layout))
    return found, found <= SAME


def int8(layout: Layout) -> tuple[float, bool]:
    """The lowest cosine of int8 weights with int8 activations per token."""
    made = layout.encoded(layout.variant("int8", RTN(bits=8, activations="dynamic_per_token")))
    found = lowest_cosine(made, layout.encoded(layout.folder))
    return found, found >= INT8_COSINE


def int4(layout: Layout) -> tuple[float, bool]:
    """The lowest cosine of GPTQ's int4 weights; the packed weights must give what the unpacked ones give."""
    packed = layout.variant("int4", GPTQ(bits=4, group_size=16, symmetric=False))
    made = layout.encoded(packed)
    plain = unpacked(packed, layout.texts)
    return lowest_cosine(made, layout.encoded(layout.folder)), difference(made, plain) <= SAME


def unpacked(variant: Path, texts: Sequence[str]) -> Vectors:
    """The vectors of a variant whose layers are replaced by plain float32 layers with the values that they stand for."""
    from compress.layers.compressed import CompressedLinear
    from compress.models.opened import empty_model, weights_of
    from compress.runtimes.torch_embedder import TorchEmbedder

    folder = folder_of(variant)
    network = empty_model(folder)
    weights_of(folder, network).fill(network)
    for name, module in list(network.named_modules()):
        if isinstance(module, CompressedLinear):
            network.set_submodule(name, module.plain())
    return TorchEmbedder(folder, network.float(), torch.device("cpu"), torch.float32).encode(list(texts))


def depth(layout: Layout) -> tuple[float, bool]:
    """The lowest cosine without half of the blocks."""
    made = layout.encoded(layout.variant("depth", Depth(keep=0.5)))
    return lowest_cosine(made, layout.encoded(layout.folder)), True


def width(layout: Layout) -> tuple[float, bool]:
    """The lowest cosine with half of the channels of every MLP."""
    made = layout.encoded(layout.variant("width", Width(channels=0.5)))
    return lowest_cosine(made, layout.encoded(layout.folder)), True


def _graph(layout: Layout, runtime: str) -> tuple[float, bool]:
    lower(folder_of(layout.whole), runtime)
    found = difference(layout.encoded(layout.whole, runtime=runtime), layout.encoded(layout.whole, runtime="torch"))
    return found, found <= SAME_GRAPH


def onnxruntime(layout: Layout) -> tuple[float, bool]:
    """The difference of ONNX Runtime to torch, in float32."""
    return _graph(layout, "onnxruntime")


def openvino(layout: Layout) -> tuple[float, bool]:
    """The difference of OpenVINO to torch, in float32."""
    return _graph(layout, "openvino")


def exported(layout: Layout) -> tuple[float, bool]:
    """The difference of sentence-transformers reading an export, of a pruned variant where there is one."""
    pruned = next((layout.scratch / name for name in ("depth", "width") if (layout.scratch / name).exists()), layout.whole)
    target = layout.scratch / "export"
    export(pruned, "sentence-transformers", target, check=False)
    found = difference(layout.encoded(pruned, runtime="torch"), reference(target, layout.texts))
    return found, found <= SAME


CELLS: dict[str, Callable[[Layout], tuple[float, bool]]] = {
    "load": load,
    "stream": stream,
    "int8": int8,
    "int4-gptq": int4,
    "depth": depth,
    "width": width,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "export": exported,
}


@dataclass(frozen=True)
class Cell:
    """A cell of the table."""

    value: float | None
    """The number; None where it was refused."""
    refusal: str = ""
    """The first line of the refusal."""
    good: bool = True
    """Whether the number meets its bar."""


def told(error: UserError, folder: Path, scratch: str) -> str:
    """The first line of a refusal, as it reads for any folder."""
    line = str(error).splitlines()[0].replace(str(folder), "").replace(scratch, "").replace("tiny has", "it has")
    return textwrap.shorten(line.strip(": /").removeprefix("tiny: "), 200, placeholder=" ...")


def cells(folder: Path, columns: Sequence[str] = tuple(CELLS)) -> dict[str, Cell]:
    """Fill a row. Anything but a number or a `UserError` is raised: no other error may come out of any cell."""
    warnings.simplefilter("ignore")
    row = {}
    with tempfile.TemporaryDirectory() as scratch:
        layout = Layout(folder, Path(scratch))
        for name in columns:
            try:
                value, good = CELLS[name](layout)
                row[name] = Cell(value, good=good)
            except UserError as error:
                row[name] = Cell(None, told(error, folder, scratch))
            if name == "load" and row[name].value is None:
                break  # refused as a whole
    return row


DIFFERENCES = ("load", "stream", "onnxruntime", "openvino", "export")
"""Columns that hold a difference, which is small; the others hold a cosine, which is large."""


def shown(column: str, value: float) -> str:
    """A number as the table shows it: a cosine, or the power of ten that a difference stays below on any machine."""
    if column not in DIFFERENCES:
        return f"{value:.3f}"
    return "1e-6" if value <= 1e-6 else f"1e{math.ceil(math.log10(value)):d}"


def table(rows: Mapping[str, Mapping[str, Cell]]) -> str:
    """The table of docs/models.md: a line for each layout, and the reasons of refusals below."""
    reasons: dict[str, int] = {}
    lines = [f"| layout | {' | '.join(CELLS)} |", f"|---|{'---|' * len(CELLS)}"]
    for name in tiny_layouts.LAYOUTS:
        if name not in rows:
            continue
        shows = []
        for column in CELLS:
            cell = rows[name].get(column)
            if cell is None:
                shows.append("")
            elif cell.value is None:
                number = reasons.setdefault(cell.refusal, len(reasons) + 1)
                shows.append(f"refused ({number})")
            else:
                shows.append(shown(column, cell.value))
        lines.append(f"| `{name}` | {' | '.join(shows)} |")
    looks = [f"- `{name}`: {(tiny_layouts.LAYOUTS[name].__doc__ or '').strip()}" for name in tiny_layouts.LAYOUTS if name in rows]
    refusals = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", "What was refused, and why:", "", *refusals, "", "What each layout looks like:", "", *looks])


def save(name: str, row: Mapping[str, Cell]) -> None:
    """Keep a row for the table."""
    ROWS.mkdir(parents=True, exist_ok=True)
    (ROWS / f"{name}.json").write_text(json.dumps({column: asdict(cell) for column, cell in row.items()}), encoding="utf-8")


def saved() -> dict[str, dict[str, Cell]]:
    """The rows that were kept."""
    return {
        path.stem: {column: Cell(**cell) for column, cell in json.loads(path.read_text(encoding="utf-8")).items()}
        for path in ROWS.glob("*.json")
    }


def write_page() -> None:
    """Write the rows that were kept into docs/models.md, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(saved())}\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Print the rows of some layouts, or write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="layouts; all by default")
    parser.add_argument("--columns", nargs="*", default=list(CELLS))
    parser.add_argument("--write", action="store_true", help="write docs/models.md from the rows that the tests kept")
    arguments = parser.parse_args()
    if arguments.write:
        write_page()
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for name in arguments.names or list(tiny_layouts.LAYOUTS):
            failed = tiny_layouts.make(Path(place), [name])
            if failed:
                print(f"{name}: cannot be made: {failed}", flush=True)
                continue
            print(name, flush=True)
            for column, cell in cells(Path(place) / name, arguments.columns).items():
                said = cell.refusal if cell.value is None else f"{cell.value:.3g}{'' if cell.good else '   misses its bar'}"
                print(f"   {column:12} {said}", flush=True)
            shutil.rmtree(Path(place) / name)


if __name__ == "__main__":
    main()
