"""Speed, memory and accuracy on a CPU: our variants against the alternatives for the same model.

    python benchmarks/peers_quantization.py --ours int8=results/<run> --ours int8-ov=results/<run>:openvino
    python benchmarks/peers_quantization.py --ours int8=results/<run> --tasks STSBenchmark,SciFact --data FOLDER \\
        --markdown table.md --json quantization.json --plot plot.svg

Every row runs in a process of its own, in the environment that it needs (`ENVIRONMENTS`), as its library does by default.
Conversions are made in earlier processes and kept under `--work`, as are scores: a stopped run goes on. Rounds are interleaved,
one process works at a time, and a ratio is the median of the rounds' own. Peak memory is the whole process's, its libraries and
loading included, read after a first pass over the texts, which also warms. A row that cannot run here is reported with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from environments import TORCH, add_environments_option, python_of

import compress
from compress.common.cache import cache_root
from compress.common.errors import UserError
from compress.common.files import write_text_atomic
from compress.common.journal import Journal
from compress.common.machine import machine, now
from compress.data.texts import calibration_texts, measure_texts
from compress.models.source import find
from compress.models.text.spec import EmbedderSpec
from compress.reports.plot import Panel, Point, figure

if TYPE_CHECKING:
    from compress.measure.accuracy.tasks import Task

WORKER = Path(__file__).with_name("quantization_peer.py")
OURS = "ours"  # this Python, with what it has
# optimum-onnx wants transformers below 4.58, as ctranslate2 does without saying so; sentence-transformers 6 wants 5. optimum-intel
# wants a huggingface-hub that the newest datasets does not, and from 2.2 on a torchvision, which the CPU build of torch lacks.
ENVIRONMENTS: dict[str, list[str]] = {
    "sentence-transformers": ["sentence-transformers==6.2.0", "transformers==5.23.0"],
    "sentence-transformers-onnx": [
        "sentence-transformers[onnx]==5.7.0", "transformers==4.57.6", "optimum-onnx==0.1.0", "onnxruntime==1.32.0", "onnx==1.23.2",
    ],
    "sentence-transformers-openvino": [
        "sentence-transformers==6.2.0", "transformers==5.5.4", "optimum-intel==2.1.0", "openvino==2026.4.1", "nncf==3.4.0",
        "datasets==5.0.1",
    ],
    "onnxruntime": ["onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2", "transformers==5.23.0"],
    "ctranslate2": ["ctranslate2==4.8.5", "transformers==4.57.6"],
    "bitsandbytes": ["bitsandbytes==0.50.2", "accelerate==1.15.0", "sentence-transformers==6.2.0", "transformers==5.23.0"],
}  # fmt: skip
RUNTIMES = ("torch", "onnxruntime", "openvino", "auto")


@dataclass(frozen=True)
class Row:
    name: str
    peer: str
    """Name of the class in the worker."""
    environment: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def said(self) -> dict[str, Any]:
        """Return the options without where things lie on this machine."""
        return {key: value for key, value in self.options.items() if key != "model"}


REFERENCE = Row("sentence-transformers fp32", "SentenceTransformers", "sentence-transformers", {"dtype": "float32"})
ROWS = (
    REFERENCE,
    Row("sentence-transformers bf16", "SentenceTransformers", "sentence-transformers", {"dtype": "bfloat16"}),
    Row("sentence-transformers onnx qint8", "SentenceTransformersOnnx", "sentence-transformers-onnx"),
    Row("sentence-transformers openvino", "SentenceTransformersOpenVino", "sentence-transformers-openvino", {"static": False}),
    Row(
        "sentence-transformers openvino static int8",
        "SentenceTransformersOpenVino",
        "sentence-transformers-openvino",
        {"static": True},
    ),
    Row("onnxruntime fp32", "OnnxRuntime", "onnxruntime", {"dynamic": False}),
    Row("onnxruntime dynamic int8", "OnnxRuntime", "onnxruntime", {"dynamic": True}),
    Row("ctranslate2 int8", "CTranslate2", "ctranslate2"),
    Row("bitsandbytes LLM.int8", "BitsAndBytes", "bitsandbytes"),
    Row("ours fp32", "Ours", OURS, {"dtype": "float32", "runtime": "torch"}),
    Row("ours bf16", "Ours", OURS, {"dtype": "bfloat16", "runtime": "torch"}),
)


@dataclass
class Result:
    name: str
    environment: str
    options: Mapping[str, Any]
    remark: str = ""
    """Description by the peer itself, or the reason why it has no numbers."""
    texts_per_second: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Seconds of all cores together, per round."""
    others_seconds: list[float] = field(default_factory=list)
    """Cores that other processes used meanwhile: a process that runs next to a peer can slow it down many times."""
    ratio: float | None = None
    cosine_mean: float | None = None
    cosine_min: float | None = None
    peak_bytes: int | None = None
    weights_bytes: int | None = None
    threads: int | None = None
    scores: dict[str, float] = field(default_factory=dict)
    kept: float | None = None
    """Mean score, in % of the reference's."""


class PeerError(RuntimeError):
    """A row cannot run here."""


class PeerProcess:
    """A running worker in a row's environment; its output goes to a log."""

    def __init__(self, row: Row, python: Path, output: Path) -> None:
        self._log = output / "logs" / f"{slug(row.name)}.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "hub")}
        if row.environment != OURS:
            environment.pop("PYTHONPATH", None)
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            PeerError: it could not; names why.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerError(f"{do}: the process ended with code {self._process.wait()}, see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{do}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class PeerEmbedder:
    """A peer's process with the interface of an embedder."""

    def __init__(self, name: str, dimension: int, spec: EmbedderSpec, process: PeerProcess, file: Path) -> None:
        self.name, self.dimension, self.spec = name, dimension, spec
        self._process, self._file = process, file

    def encode(
        self, texts: Iterable[str], prompt: str | None = None, *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Any:
        """Embed texts; how they are batched is the peer's."""
        listed = [(prompt or "") + text for text in texts]
        if not listed:
            return np.empty((0, self.dimension), dtype=np.float32)
        self._process.ask("save", texts=listed, path=str(self._file))
        return np.load(self._file)


class Bench:
    """The rows on one model: environments, conversions, scores, speed; a row that fails is skipped from then on."""

    def __init__(self, base: str, rows: Sequence[Row], output: Path, environments: Path) -> None:
        self.source, self.rows, self.output, self.environments = find(base), rows, output, environments
        self.spec = self.source.spec
        if self.spec.default_prompt or not self.spec.pool_prompt:
            sys.exit(f"{base}: a model with a default or unpooled prompt; what is written by hand here has none")
        calibration = output / "calibration"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in calibration_texts())
        write_text_atomic(calibration / "train.jsonl", lines)
        network = self.source.transformer.resolve()
        self.side = {
            "network": str(network), "pooling": str(self.spec.pooling), "normalize": self.spec.normalize,
            "max_length": self.source.tokenizer.max_length, "calibration": str(calibration),
        }  # fmt: skip
        self.fingerprint = self.source.fingerprint
        self.calibration = digest(lines)
        self.keys = {row.name: self._key(row) for row in rows}
        self.results = {row.name: Result(row.name, row.environment, row.said()) for row in rows}
        self.failed: set[str] = set()
        self.pythons: dict[str, Path] = {OURS: Path(sys.executable)}
        self.versions: dict[str, dict[str, str]] = {}

    def running(self) -> list[Row]:
        return [row for row in self.rows if row.name not in self.failed]

    def fail(self, row: Row, error: Exception) -> None:
        if row == REFERENCE:
            sys.exit(f"{row.name}: {error}; without it there is nothing to compare with")
        say(f"{row.name}: cannot: {error}")
        self.failed.add(row.name)
        self.results[row.name].remark = str(error)

    def _key(self, row: Row) -> str:
        """Name what decides what a row makes of the model."""
        model = row.options.get("model")
        decided = [row.peer, dict(row.options), requirements(row.environment), self.fingerprint, self.calibration]
        return f"{slug(row.name)}-{digest(json.dumps([*decided, model and find(model).fingerprint], sort_keys=True))}"

    def start(self, row: Row, load: bool = True) -> PeerProcess:
        process = PeerProcess(row, self.pythons[row.environment], self.output)
        try:
            if row.environment not in self.versions:
                self.versions[row.environment] = process.ask("versions")
            if load:
                folder = str(self.output / "prepared" / self.keys[row.name])
                loaded = process.ask("load", peer=row.peer, folder=folder, side=self.side, options=dict(row.options))
                self.results[row.name].weights_bytes = loaded["weights_bytes"]
        except BaseException:
            process.close()
            raise
        return process

    def prepare(self) -> None:
        """Make environments and conversions."""
        for row in self.rows:
            folder = self.output / "prepared" / self.keys[row.name]
            try:
                if row.environment not in self.pythons:
                    name = f"peer-{row.environment}"
                    self.pythons[row.environment] = python_of(name, ENVIRONMENTS[row.environment], self.environments)
                if folder.exists() and "model" not in row.options:
                    continue
                say(f"{row.name}: preparing")
                partial = folder.with_name(f"{folder.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                with self.start(row, load=False) as process:
                    process.ask(
                        "prepare", peer=row.peer, base=str(self.source.path.resolve()), folder=str(partial), side=self.side,
                        options=dict(row.options),
                    )  # fmt: skip
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            except subprocess.CalledProcessError as error:
                self.fail(row, PeerError(f"its environment cannot be made: pip ended with code {error.returncode}"))
            except PeerError as error:
                self.fail(row, error)

    def score(self, tasks: Sequence[Task]) -> None:
        """Score the rows on tasks, one process at a time; what was scored before is read."""
        from compress.measure.accuracy.score import score_task

        journal = Journal(self.output / "scores")
        width = self.source.shape.hidden_size
        for row in self.running():
            code = own_code() if row.environment == OURS else ""
            keys = {task.name: f"{self.keys[row.name]}-{task.name}-{digest(task.fingerprint + code)}" for task in tasks}
            missing = [task for task in tasks if not journal.has(keys[task.name])]
            try:
                if missing:
                    with self.start(row) as process:
                        embedder = PeerEmbedder(row.name, width, self.spec, process, self.output / "scored.npy")
                        for task in missing:
                            found = score_task(embedder, task)
                            say(f"{row.name}: {task.name} {100 * found.score:.2f} ({found.seconds:.0f} s)")
                            journal.put(keys[task.name], found.model_dump(mode="json", include={"metric", "score", "seconds"}))
            except PeerError as error:
                self.fail(row, error)
                continue
            self.results[row.name].scores = {task.name: journal.get(keys[task.name])["score"] for task in tasks}

    def time(self, texts: Sequence[str], rounds: int) -> None:
        """Measure memory, vectors and, in interleaved rounds, seconds."""
        processes: dict[str, PeerProcess] = {}
        try:
            for row in self.running():
                say(f"{row.name}: loading, first pass")
                try:
                    processes[row.name] = self.start(row)
                    self._first_pass(self.results[row.name], processes[row.name], texts)
                except PeerError as error:
                    self._drop(row, error, processes)
            for turn in range(rounds):
                say(f"round {turn + 1} of {rounds}")
                for row in self.running():
                    busy, result = busy_seconds(), self.results[row.name]
                    try:
                        taken = processes[row.name].ask("encode", texts=texts)
                    except PeerError as error:
                        self._drop(row, error, processes)
                        continue
                    result.seconds.append(taken["seconds"])
                    result.cpu_seconds.append(taken["cpu_seconds"])
                    result.others_seconds.append(max(0.0, busy_seconds() - busy - taken["cpu_seconds"]))
                    if result.others_seconds[-1] > 0.1 * taken["seconds"] + 0.1:
                        say(f"{row.name}: other processes had {result.others_seconds[-1]:.1f} s of the cores meanwhile")
        finally:
            for process in processes.values():
                process.close()

    def _first_pass(self, result: Result, process: PeerProcess, texts: Sequence[str]) -> None:
        result.peak_bytes = process.ask("memory", texts=texts)["peak_bytes"]
        said = process.ask("threads")
        result.threads, result.remark = said["threads"], said["remark"]
        process.ask("save", texts=texts, path=str(self._vectors(result.name)))

    def _drop(self, row: Row, error: PeerError, processes: dict[str, PeerProcess]) -> None:
        self.fail(row, error)
        if row.name in processes:
            processes.pop(row.name).close()

    def _vectors(self, name: str) -> Path:
        return self.output / f"{slug(name)}.npy"

    def compare(self) -> None:
        """Relate what was measured to the reference."""
        reference = self.results[REFERENCE.name]
        theirs = unit(np.load(self._vectors(REFERENCE.name)))
        for row in self.running():
            result = self.results[row.name]
            own = unit(np.load(self._vectors(row.name)))
            cosines = (own * theirs).sum(axis=1)
            result.cosine_mean, result.cosine_min = float(cosines.mean()), float(cosines.min())
            result.texts_per_second = len(own) / median(result.seconds)
            result.ratio = median(base / mine for base, mine in zip(reference.seconds, result.seconds, strict=True))
            if result.scores:
                result.kept = 100 * sum(result.scores.values()) / sum(reference.scores.values())


def busy_seconds() -> float:
    """Return the busy time of all cores since the machine's start; 0 where the kernel does not report it."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts = map(int, path.read_text(encoding="ascii").split("\n")[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def elsewhere(words: Sequence[str]) -> list[str]:
    """Leave out of a command what says where this machine keeps things."""
    places = ("--environments", "--work")
    return [word for before, word in zip(["", *words], words, strict=False) if not {before, word} & set(places)]


def unit(vectors: Any) -> Any:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def requirements(environment: str) -> list[str]:
    return [] if environment == OURS else [TORCH, *ENVIRONMENTS[environment]]


@cache
def own_code() -> str:
    """Return a fingerprint of our own code, which has no pinned version; scores of other code are computed again."""
    return digest("".join(path.read_text(encoding="utf-8") for path in sorted(Path(compress.__file__).parent.rglob("*.py"))))


def own_row(argument: str) -> Row:
    """Parse NAME=PATH[:RUNTIME]."""
    name, equals, path = argument.partition("=")
    runtime = next((runtime for runtime in RUNTIMES if path.endswith(f":{runtime}")), None)
    path = path.removesuffix(f":{runtime}")
    if not (name and equals and Path(path).is_dir()):
        raise argparse.ArgumentTypeError(
            f"{argument!r}: NAME=PATH[:RUNTIME] is wanted, PATH a folder, RUNTIME of {', '.join(RUNTIMES)}"
        )
    return Row(name, "Ours", OURS, {"model": str(Path(path).resolve()), **({"runtime": runtime} if runtime else {})})


def table(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """Return the results as rows of a Markdown table."""

    def number(value: float | None, form: str, scale: float = 1.0) -> str:
        return "–" if value is None else format(value * scale, form)

    head = ["", "texts/s", "ratio", "cosine mean", "min", "peak MB", "weights MB", *tasks, *(["kept %"] if tasks else []), "remark"]
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"]]
    for one in results:
        scores = [number(one.scores.get(task), ".2f", 100) for task in tasks]
        kept = [number(one.kept, ".2f")] if tasks else []
        remark = one.remark if len(one.remark) <= 160 else f"{one.remark[:157]}..."
        lines.append(
            [
                one.name, number(one.texts_per_second, ".1f"), number(one.ratio, ".2f"), number(one.cosine_mean, ".5f"),
                number(one.cosine_min, ".5f"), number(one.peak_bytes, ".0f", 1e-6), number(one.weights_bytes, ".1f", 1e-6),
                *scores, *kept, remark.replace("|", "\\|"),
            ]
        )  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="minilm", help="model of all rows, and the model that ours were made from")
    parser.add_argument(
        "--ours", type=own_row, action="append", default=[], metavar="NAME=PATH[:RUNTIME]", help="a variant or a run"
    )
    parser.add_argument("--only", help="names of rows, separated by commas; the reference is always included")
    parser.add_argument("--texts", default="mini", help="JSONL file with `text`, or mini")
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tasks", help="tasks to score, separated by commas; defaults to none")
    parser.add_argument("--data", type=Path, help="folder with the tasks' data")
    parser.add_argument("--work", type=Path, default=cache_root() / "peers-quantization", help="folder for conversions and scores")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="SVG file: speed against accuracy kept")
    add_environments_option(parser)
    return parser


def write(bench: Bench, tasks: list[Task], texts: list[str], arguments: argparse.Namespace) -> None:
    """Print the table, and write it, the numbers and the plot where files are named for them."""
    results = list(bench.results.values())
    shown = table(results, [task.name for task in tasks])
    print(shown, end="")
    found = {
        "created": now(),
        "command": shlex.join(["python", "benchmarks/peers_quantization.py", *elsewhere(sys.argv[1:])]),
        "machine": machine(None).model_dump(mode="json"),
        "base": {"name": bench.source.name, "fingerprint": bench.fingerprint},
        "texts": {"source": arguments.texts, "count": len(texts), "seed": arguments.seed},
        "rounds": arguments.rounds,
        "environments": {
            name: {"requirements": requirements(name), "versions": versions} for name, versions in bench.versions.items()
        },
        "rows": [asdict(result) for result in results],
    }
    if arguments.markdown:
        write_text_atomic(arguments.markdown, shown)
    if arguments.json:
        write_text_atomic(arguments.json, json.dumps(found, indent=1) + "\n")
    if arguments.plot:
        points = [Point(str(row["name"]), row["ratio"], row["kept"]) for row in found["rows"] if row["ratio"] and row["kept"]]
        panel = Panel("", "texts/s, relative to sentence-transformers fp32", "score kept, %", points)
        write_text_atomic(arguments.plot, figure([[panel]]))


def main() -> None:
    parser = options()
    arguments = parser.parse_args()

    rows = [*ROWS, *arguments.ours]
    names = [row.name for row in rows]
    if len({slug(name) for name in names}) < len(names):
        parser.error("two rows have the same name")
    only = arguments.only.split(",") if arguments.only else names
    if strange := [name for name in only if name not in names]:
        parser.error(f"--only: no row {strange[0]!r}; there are {', '.join(names)}")
    if arguments.plot and not arguments.tasks:
        parser.error("--plot needs --tasks")
    rows = [row for row in rows if row == REFERENCE or row.name in only]

    try:
        texts = measure_texts(arguments.texts, arguments.count, arguments.seed)
        tasks: list[Task] = []
        if arguments.tasks:
            from compress.measure.accuracy.tasks import find_tasks

            tasks = find_tasks(arguments.tasks.split(","), arguments.data)
        bench = Bench(arguments.base, rows, arguments.work.resolve(), arguments.environments)
        bench.prepare()
        bench.score(tasks)
    except UserError as error:
        sys.exit(str(error))
    bench.time(texts, arguments.rounds)
    bench.compare()

    write(bench, tasks, texts, arguments)


if __name__ == "__main__":
    main()
