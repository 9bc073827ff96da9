"""Units of work, done by one worker in this process, or by several of Ray; results come in the order of the units.

This is the one door: what is to run on many machines is a function that makes a worker, and an iterable of units. A worker is a
function of a unit; it is made once, in the process that works, so that a model is loaded once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

Unit = TypeVar("Unit")
Made = TypeVar("Made")
Worker = Callable[[Any], Any]
MakeWorker = Callable[[], Worker]
"""Makes a worker. It and all units are pickled: a function of a module, or a `functools.partial` of one."""
Map = Callable[[Iterable[Any]], Iterator[Any]]
"""Does units and yields what became of them, in their order. Units are taken from the iterable as workers get free."""


@dataclass(frozen=True)
class RayOptions:
    """Which workers of Ray do the units."""

    address: str | None = None
    """Of a running Ray: `auto`, `HOST:PORT` or `ray://HOST:PORT`. None: one on this machine alone, which ends with the work."""
    workers: int = 1
    """Number of workers."""
    cpus: int = 1
    """Cores of each."""
    gpus: float = 0.0
    """GPUs of each."""


@contextmanager
def working(make_worker: MakeWorker, ray: RayOptions | None = None) -> Iterator[Map]:
    """Hand out what does units; workers live as long as the block.

    Args:
        make_worker: makes a worker.
        ray: None: one worker, in a thread of this process. While it works, the next unit is taken and the last result handed out.

    Raises:
        UserError: Ray is not installed, cannot be reached or has no room for the workers; or whatever a worker raises.
    """
    if ray is None:
        with ThreadPoolExecutor(1, thread_name_prefix="unit") as thread:
            yield _Local(make_worker, thread).map
        return
    from compress.scale.ray_workers import ray_working

    with ray_working(make_worker, ray) as mapped:
        yield mapped


def map_units(make_worker: MakeWorker, units: Iterable[Any], ray: RayOptions | None = None) -> Iterator[Any]:
    """Do units and yield what became of them, in their order; see `working`."""
    with working(make_worker, ray) as mapped:
        yield from mapped(units)


class _Local:
    """A worker in a thread."""

    def __init__(self, make_worker: MakeWorker, thread: ThreadPoolExecutor) -> None:
        self._make, self._thread = make_worker, thread
        self._worker: Worker | None = None

    def _work(self, unit: Any) -> Any:
        if self._worker is None:
            self._worker = self._make()
        return self._worker(unit)

    def map(self, units: Iterable[Any]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        try:
            for unit in units:
                waiting.append(self._thread.submit(self._work, unit))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
