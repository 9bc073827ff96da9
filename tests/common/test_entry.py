"""How the command ends: its exit codes, in our words, from its first line on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_support import call_here

from compress.common import entry
from compress.common.children import tied
from compress.common.errors import UserError
from compress.common.failures import DEFECT, WRONG, told

ENTRY = "import sys; from compress.common.entry import main; {first}; main()"


def call(*arguments: object, first: str = "pass", **options: object) -> subprocess.CompletedProcess[str]:
    """Call the command in a process in which `first` is run before it."""
    command = [sys.executable, "-c", ENTRY.format(first=first), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/record.json"), "error: /x/record.json: the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/x/y"), "error: /x/y: the disk is full"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x/" + "n" * 300), "the name is too long"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "error: /x: no permission"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), "error: /x: no permission"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (MemoryError(), "error: not enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), "error: not enough memory"),
        (UserError("wrong", "right"), "error: wrong\nright"),
    ],
)
def test_what_a_user_can_mend_is_said_in_our_words(error: BaseException, said: str) -> None:
    code, text = told(error)
    assert code == WRONG == 2
    assert said in text
    assert "Traceback" not in text


def test_a_defect_is_one_line_a_log_and_70(cache: Path) -> None:
    code, text = told(ZeroDivisionError("division by zero"))
    assert code == DEFECT == entry.DEFECT == 70
    first, second = text.splitlines()
    assert first == "error: a defect of this program: ZeroDivisionError: division by zero"
    (log,) = (cache / "logs").iterdir()
    assert str(log) in second
    assert "ZeroDivisionError" in log.read_text()


def test_the_command_ends_so_too(tmp_path: Path, cache: Path) -> None:
    broken = "import compress.reports.compare as c; c.find_runs = lambda places: 1 / 0"
    ended = call("compare", tmp_path, first=broken)
    assert (ended.returncode, "Traceback" in ended.stderr, str(cache / "logs") in ended.stderr) == (70, False, True)
    assert call("nonsense").returncode == 2
    assert call("compare", tmp_path / "nothere").returncode == 2


def test_nobody_reads_what_is_printed() -> None:
    command = [sys.executable, "-m", "compress.cli", "schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


SLOW = "import compress.reports.compare as c, time; c.find_runs = lambda places: (print('here', flush=True), {work})"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("work", ["time.sleep(60)", "[s for s in iter(lambda: sleepy(time), 1)]"])
def test_signals_end_it_with_their_code(tmp_path: Path, number: signal.Signals, work: str) -> None:
    """Also where a library swallows what a signal raises."""
    swallow = "def sleepy(time):\n    try: time.sleep(60)\n    except BaseException: return 0\n"
    first = f"exec({swallow!r}, globals()); {SLOW.format(work=work)}"
    command = [sys.executable, "-c", ENTRY.format(first=first), "compare", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said.splitlines() == [
        "error: stopped" + (" by SIGTERM" if number == signal.SIGTERM else ""),
        "the same command starts over",
    ]


def test_a_signal_in_a_finalizer_leaves_no_traceback() -> None:
    """Python prints what a finalizer raises, and goes on: the command ends all the same, within its grace."""
    code = """
import os, signal, sys, time
from compress.common import entry
class Leaving:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):
            pass
def work():
    Leaving()
    print("goes on", flush=True)
    time.sleep(60)
entry._outcome = work
entry.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 143
    assert done.stdout == "goes on\n"
    assert "Traceback" not in done.stderr
    assert "error: stopped by SIGTERM" in done.stderr


def test_signals_are_handled_before_anything_heavy_is_imported() -> None:
    code = "import sys, compress.common.entry as e; print(sorted({'typer', 'pydantic', 'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    first = "import os, signal, compress.common.lazy as l; l.attribute = lambda _: os.kill(os.getpid(), signal.SIGTERM)"
    ended = call("run", "x.yaml", first=first)
    assert ended.returncode == 143
    assert ended.stderr == "error: stopped by SIGTERM\nfinished parts of the run are kept; the same command continues it\n"


@pytest.mark.skipif(sys.platform != "linux", reason="no prctl")
def test_children_end_with_their_parent() -> None:
    child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"]
    code = f"import subprocess, time; from compress.common.children import tied; subprocess.Popen(tied({child!r})); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
        for _ in range(100):
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
                return
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
        pytest.fail("the child outlived its parent")


def test_a_program_that_is_not_there_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        tied(["no-such-program"])


@pytest.mark.parametrize("model", ["./nothere", "../nothere", "/no/there", "nothere"])
def test_a_path_that_is_not_there_is_no_name_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str
) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    monkeypatch.chdir(tmp_path)
    code, _, said = call_here(capfd, "encode", model, "a.txt", "-o", "v.npy")
    assert code == 2
    assert "not a folder, a hub name (owner/name) or a built-in model" in said


def test_what_could_be_known_before_the_work_is_said_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "r.yaml").write_text("name: ../../x\n")
    monkeypatch.chdir(tmp_path)
    for words, wanted in (
        (("encode", "nano", "a.txt", "-o", "missing/v.npy"), "there is no folder missing"),
        (("encode", "nano", "a.txt", "-o", tmp_path), "is a folder"),
        (("plan", "r.yaml"), "r.yaml, line 1: name: "),
    ):
        code, _, said = call_here(capfd, *words)
        assert (code, wanted in said) == (2, True)
