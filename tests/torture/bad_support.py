"""Broken and hostile inputs: what a case is, where it lives, and how the command line's answer to it is judged.

Each case runs in a fork of a process that has imported the package. A case is well taken where the exit code is one of those expected,
nothing is a traceback, the message holds what it is to name, time and memory stay within bounds, and nothing is written outside the
case's own folders.
"""

from __future__ import annotations

import copy
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHAPE = "num_hidden_layers=2,hidden_size=64,num_attention_heads=2,intermediate_size=128"
QUICK = "steps: [{method: rtn}]\nevaluate: {tasks: []}\nmeasure: {what: []}\n"
ALLOWED = {"cwd", "out", "cache", "tmp", "stdout.txt", "stderr.txt"}
PLANTED = "PWNED"
"""Name of the file that hostile inputs try to make."""
ADDRESS_SPACE = 14 * 10**9


@dataclass
class Case:
    """An input and what is expected of the answer."""

    kind: str
    name: str
    build: Callable[[Place], list[str]]
    """Writes the input, and returns the arguments of `compress`."""
    needle: str = ""
    """What the message must hold: the file, the key, the line."""
    codes: tuple[int, ...] = (2,)
    seconds: float = 40
    megabytes: float = 500
    """Beyond what the process had before."""
    never: tuple[str, ...] = ()
    """Paths in the case's folder that must not come to be."""
    kept: tuple[str, ...] = ()
    """Paths in the working folder that must stay the kind of file that they are."""

    @property
    def full_name(self) -> str:
        """The name in tests."""
        return f"{self.kind}: {self.name}"


class Place:
    """The folders of one case: `cwd` with the input, `out`, `cache`, `tmp`; `base` has what inputs are made from."""

    def __init__(self, root: Path, base: Path, record: dict[str, Any]) -> None:
        self.root, self.base, self.record = root, base, record
        shutil.rmtree(root, ignore_errors=True)
        for name in ("cwd", "out", "cache", "tmp"):
            (root / name).mkdir(parents=True)
        self.cwd, self.out = root / "cwd", root / "out"
        (self.cwd / "texts.txt").write_text("one\ntwo words\n")

    def recipe(self, text: str | bytes, name: str = "r.yaml") -> str:
        (self.cwd / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    def model(self, name: str = "model") -> Path:
        return Path(shutil.copytree(self.base / "model", self.cwd / name))

    def variant(self, name: str = "variant") -> Path:
        return Path(shutil.copytree(self.base / "variant", self.cwd / name))

    def encode(self, model: Path | str, *more: str) -> list[str]:
        return ["encode", str(model), "texts.txt", "-o", "../out/v.npy", *more]

    def evaluate(self, folder: str, task: str) -> list[str]:
        return ["evaluate", str(self.base / "model"), "--tasks", task, "--data", folder]

    def results(self, change: Callable[[dict[str, Any]], Any] | None = None, raw: bytes | None = None) -> None:
        """A folder of results with one sound run and one that was changed."""
        for name, made in (("sound", None), ("bad", change)):
            record = copy.deepcopy(self.record)
            record["run"] = name
            content = json.dumps((made(record) if made else None) or record).encode()
            (self.cwd / "results" / name).mkdir(parents=True)
            (self.cwd / "results" / name / "record.json").write_bytes(raw if raw is not None and name == "bad" else content)


def edited(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes))


def tensors_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_tensors(path: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file; `length` is what it claims its header to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def prepare(base: Path) -> None:
    """Make a small sentence-transformers model, which is said to be trained, and its variant in int8."""
    import compress
    from compress.models.folder import ModelFolder
    from compress.runtimes.lower import lower

    if (base / "variant").exists():
        return
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    (base / "r.yaml").write_text(QUICK.replace("{method: rtn}", "{method: rtn, activations: none}"))
    os.environ["COMPRESS_CACHE"] = str(base / "cache")
    compress.run(base / "r.yaml", model=f"random:minilm,{SHAPE}", output=base / "runs", device="cpu", say=lambda _: None)
    (model,) = (base / "cache" / "random").iterdir()
    shutil.copytree(model, base / "model")
    (base / "model" / "random.json").unlink()
    (run,) = (base / "runs").iterdir()
    shutil.copytree(run / "variant", base / "variant.partial")
    lower(ModelFolder("variant", base / "variant.partial"), "onnxruntime")
    (base / "variant.partial" / "onnxruntime.onnx").rename(base / "onnxruntime.onnx")
    (base / "variant.partial").rename(base / "variant")


def _become(place: Place, arguments: list[str]) -> None:
    """Become the process of a case; never returns."""
    os.setsid()
    os.chdir(place.cwd)
    os.environ.update(
        COMPRESS_CACHE=str(place.root / "cache"), TMPDIR=str(place.root / "tmp"), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1"
    )
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, number in (("stdout.txt", 1), ("stderr.txt", 2)):
        os.dup2(os.open(place.root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    import tempfile

    tempfile.tempdir = None
    code = 0
    try:
        from compress.cli import main

        sys.argv = ["compress", *arguments]
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    except BaseException:  # as the interpreter would
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass
class Answer:
    """How the command line took a case."""

    code: int
    hung: bool
    seconds: float
    megabytes: float
    said: str
    printed: str
    faults: list[str] = field(default_factory=list)


def take(case: Case, work: Path, record: dict[str, Any], floor: float) -> dict[str, Any]:
    """Run a case and judge the answer.

    Args:
        case: the case.
        work: folder for the case's folders; has `base`, see `prepare`.
        record: a run's record, which some cases change.
        floor: megabytes that this process has.

    Returns:
        The answer: `kind`, `name`, `code`, `faults` (empty: well taken), `seconds`, `mb`, `said`, `command`.
    """
    place = Place(work / "case", work / "base", record)
    arguments = case.build(place)
    kinds = {name: (place.cwd / name).lstat().st_mode for name in case.kept}
    answer = _answer(case, place, arguments, floor)
    judge(case, place, answer)
    for name, mode in kinds.items():
        if not os.path.lexists(place.cwd / name) or (place.cwd / name).lstat().st_mode != mode:
            answer.faults.append(f"outside: {name} is another kind of file now")
    lines = [line for line in answer.said.splitlines() if line.strip()]
    error = next((line for line in lines if line.startswith("error:")), lines[-1] if lines else "")
    return {
        "kind": case.kind,
        "name": case.name,
        "code": answer.code,
        "faults": answer.faults,
        "seconds": round(answer.seconds, 1),
        "mb": round(answer.megabytes),
        "said": (lines[-1] if "traceback" in answer.faults else error)[:240],
        "command": shlex.join(arguments)[:200],
    }


def _answer(case: Case, place: Place, arguments: list[str], floor: float) -> Answer:
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(place, arguments)
    hung, usage, status = False, None, 0
    while usage is None:
        done, status, found = os.wait4(pid, os.WNOHANG)
        if done:
            usage = found
        elif time.monotonic() - began > case.seconds:
            hung = True
            os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
        else:
            time.sleep(0.02)
    said, printed = ((place.root / name).read_text(errors="replace") for name in ("stderr.txt", "stdout.txt"))
    page = place.out / "page.html"  # a dashboard says on its page what it could not read
    printed += page.read_text(errors="replace").partition('id="payload">')[2].partition("</script>")[0] if page.exists() else ""
    seconds, megabytes = time.monotonic() - began, usage.ru_maxrss / 1000 - floor
    return Answer(os.waitstatus_to_exitcode(status), hung, seconds, megabytes, said, printed)


def judge(case: Case, place: Place, answer: Answer) -> None:
    """Add what is wrong with an answer."""
    if answer.hung:
        answer.faults.append("hang")
    elif answer.code < 0:
        answer.faults.append(f"signal {-answer.code}")
    elif "Traceback (most recent call last)" in answer.said:
        answer.faults.append("traceback")
    elif answer.code not in case.codes:
        answer.faults.append("accepted" if answer.code == 0 else f"exit code {answer.code}")
    elif case.needle and case.needle not in answer.said + answer.printed:
        answer.faults.append("unclear")
    if answer.megabytes > case.megabytes:
        answer.faults.append("memory")
    outside = sorted(path.name for path in place.root.iterdir() if path.name not in ALLOWED)
    outside += [name for name in case.never if (place.root / name).exists()]
    for folder in (place.root.parent, place.root.parent.parent, Path("/tmp")):
        for path in folder.glob(f"{PLANTED}*"):
            outside.append(str(path))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    answer.faults += [f"outside: {name}" for name in outside]
    if answer.code:
        answer.faults += [f"left: {path.name}" for path in place.out.rglob("*.writing")]
