"""A worker of Ray that dies. Nothing heavy is imported here: the worker's process needs none of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from compress.search.sweep_worker import Outcome, RunUnit, make_runner


def deadly_runner() -> Callable[[RunUnit], Outcome]:
    """Make a worker that dies once: while its first run has finished some of its work."""
    work = make_runner()

    def once_dying(unit: RunUnit) -> Outcome:
        mark = Path(unit.output) / "died"

        def watch() -> None:
            while not list(Path(unit.output).glob(".*.partial/journal/*.json")):
                time.sleep(0.01)
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

        if not mark.exists():
            threading.Thread(target=watch, daemon=True).start()
        return work(unit)

    return once_dying
