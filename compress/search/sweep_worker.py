"""One run in a process of its own, here or on a machine of Ray's. A process that dies takes no other run with it.

`python -m compress.search.sweep_worker` reads a run as JSON from standard input, runs it, and writes JSON lines to standard output:
what the run says, and at the end what became of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.common.children import tied
from compress.common.entry import DEFECT
from compress.common.failures import WRONG, told
from compress.scale.units import Map, RayOptions, Worker
from compress.scale.units import working as ray_or_thread

SAID, OUTCOME = "said", "outcome"


@dataclass(frozen=True)
class RunUnit:
    """A run that is to be done."""

    label: str
    """What it is called in what is printed."""
    recipe: dict[str, Any]
    """The whole recipe as JSON."""
    output: str
    """Folder of the runs."""
    device: str | None
    folder: str
    """Folder that paths of the recipe are relative to. It and `output` are the same on every machine."""
    threads: int | None = None
    """CPU threads. None: as the environment says."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run."""

    run: str = ""
    """Name of the run's folder; empty: it failed."""
    code: int = 0
    """Exit code of a run that failed: 2 if a user can mend it, 70 if it is a defect."""
    error: str = ""
    """Why it failed, and how to mend that."""
    said: tuple[str, ...] = ()
    """What the run said, where it was not handed on as it came."""


def done_in_process(unit: RunUnit, say: Callable[[str], None], started: Callable[[subprocess.Popen[str]], None]) -> Outcome:
    """Do a run in a process of its own, which ends with this one.

    Args:
        unit: the run.
        say: called with each line that the run says.
        started: called with the process.
    """
    threads = {} if unit.threads is None else {"OMP_NUM_THREADS": str(unit.threads), "RAYON_NUM_THREADS": str(unit.threads)}
    command = tied([sys.executable, "-m", "compress.search.sweep_worker"])
    with tempfile.TemporaryFile("w+", encoding="utf-8") as told_so:
        told_so.write(json.dumps(asdict(unit)))
        told_so.seek(0)
        try:
            process = subprocess.Popen(
                command, stdin=told_so, stdout=subprocess.PIPE, cwd=unit.folder, env=os.environ | threads, text=True
            )
        except OSError as error:
            why = f"{unit.folder}: cannot be worked in ({error.strerror})"
            return Outcome(code=WRONG, error=f"{why}\nthe folder has to be there on every machine")
    found = None
    with process:
        started(process)
        assert process.stdout is not None
        for line in process.stdout:
            content = json.loads(line)
            if OUTCOME in content:
                found = Outcome(**content[OUTCOME])
            else:
                say(content[SAID])
    return _ended(process.returncode) if found is None else found


def _ended(code: int) -> Outcome:
    """Return the outcome of a process that ended without one."""
    if code >= 0:
        return Outcome(code=DEFECT, error=f"its process ended with exit code {code}\nthe lines above say why")
    hint = "if memory ran out: fewer --workers; the same command continues the run"
    return Outcome(code=WRONG, error=f"its process was killed by signal {-code}\n{hint}")


@contextmanager
def working(workers: int, ray: RayOptions | None, say: Callable[[str, str], None]) -> Iterator[Map]:
    """Hand out what does runs, several at a time; each in a process of its own.

    Args:
        workers: number of runs at a time in this machine's processes; with Ray, its options say it.
        ray: None: processes of this machine.
        say: called with a run's label and a line that it says; with Ray when the run has ended.
    """
    if ray is None:
        with ThreadPoolExecutor(workers, thread_name_prefix="run") as threads:
            processes = _Processes(threads, say)
            try:
                yield processes.map
            finally:
                processes.end()
        return
    with ray_or_thread(make_runner, ray) as mapped:

        def heard(units: Iterable[RunUnit]) -> Iterator[Outcome]:
            listed = list(units)
            for unit, outcome in zip(listed, mapped(listed), strict=True):
                for line in outcome.said:
                    say(unit.label, line)
                yield outcome

        yield heard


class _Processes:
    """Runs in processes, so many at a time as there are threads that wait for them."""

    def __init__(self, threads: ThreadPoolExecutor, say: Callable[[str, str], None]) -> None:
        self._threads, self._say = threads, say
        self._running: list[subprocess.Popen[str]] = []
        self._ended = False
        self._lock = threading.Lock()

    def map(self, units: Iterable[RunUnit]) -> Iterator[Outcome]:
        """Do runs, and yield what became of them in their order."""
        return self._threads.map(self._done, units)

    def _done(self, unit: RunUnit) -> Outcome:
        return done_in_process(unit, lambda line: self._say(unit.label, line), self._started)

    def _started(self, process: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.append(process)
            if self._ended:
                process.kill()

    def end(self) -> None:
        """End the runs that are under way: the sweep was stopped. What they have finished is kept."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._ended = True
            for process in self._running:
                process.kill()


def make_runner() -> Worker:
    """Make the worker of Ray that does runs."""

    def work(unit: RunUnit) -> Outcome:
        said: list[str] = []
        outcome = done_in_process(unit, said.append, lambda _: None)
        return Outcome(**{**asdict(outcome), SAID: tuple(said)})

    return work


def do_run(unit: RunUnit, say: Callable[[str], None]) -> Outcome:
    """Do a run in this process. If another process works at it, wait."""
    from compress.pipeline.recipe_file import parse_recipe
    from compress.pipeline.run import run

    try:
        record = run(parse_recipe(unit.recipe), output=Path(unit.output), device=unit.device, wait=True, say=say)
    except Exception as error:  # of any kind: the sweep goes on with the other runs, and names it with the reason
        code, text = told(error)
        return Outcome(code=code if code in (WRONG, DEFECT) else DEFECT, error=text.strip().removeprefix("error: "))
    return Outcome(run=record.run)


def main() -> None:
    """Do the run that standard input says."""
    # What libraries print must not come between the lines.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=lines, flush=True)

    unit = RunUnit(**json.load(sys.stdin))
    outcome = do_run(unit, lambda line: write({SAID: line}))
    write({OUTCOME: asdict(outcome)})


if __name__ == "__main__":
    main()
