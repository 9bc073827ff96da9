"""Workers of Ray: actors that are started again when they die, and get a unit as soon as they are free.

Ray is asked for nothing but actors. It neither reads the units nor keeps a list of what is done: who hands in the units knows what
is finished. Nothing here needs the internet: usage statistics and the dashboard are off.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from compress.common.errors import UserError, first_line
from compress.scale.units import MakeWorker, Map, RayOptions, Worker

AHEAD = 2
"""Units that a worker has at a time: one that it does, and one so that it need not wait."""
DEATHS = 8
"""How often a unit's worker may die before the unit is given up: one that needs too much memory would kill workers for ever."""
START_SECONDS = 120.0
"""How long to wait for the first worker."""
CONNECT_SECONDS = 10.0
QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


class RayWorker:
    """What an actor runs. The worker is made with the first unit, so that what goes wrong is raised with that unit."""

    def __init__(self, make_worker: MakeWorker, cpus: int) -> None:
        # Before numpy or torch is imported here, which read it once.
        os.environ |= {"OMP_NUM_THREADS": str(cpus), "RAYON_NUM_THREADS": str(cpus)}
        self._make = make_worker
        self._worker: Worker | None = None

    def work(self, unit: Any) -> Any:
        """Do a unit."""
        if self._worker is None:
            self._worker = self._make()
        return self._worker(unit)

    def process(self) -> int:
        """Return the number of the process."""
        return os.getpid()


@contextmanager
def ray_working(make_worker: MakeWorker, options: RayOptions) -> Iterator[Map]:
    """Hand out what does units by workers of Ray; see `compress.scale.units.working`."""
    if options.workers < 1 or options.cpus < 1:
        raise UserError("--ray: needs at least one worker and one core for each", "--workers 1 --worker-cpus 1")
    with connected(options) as ray:
        actor = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_restarts=-1, max_task_retries=DEATHS)(RayWorker)
        workers = [actor.remote(make_worker, options.cpus) for _ in range(options.workers)]
        try:
            _check_started(ray, workers, options)
            yield _Workers(ray, workers).map
        finally:
            for worker in workers:
                ray.kill(worker, no_restart=True)


@contextmanager
def connected(options: RayOptions) -> Iterator[Any]:
    """Connect to Ray, or start one on this machine, and hand out its module. A connection that is there already is used, and stays.

    Raises:
        UserError: Ray is not installed, or cannot be reached.
    """
    with _set({"RAY_USAGE_STATS_ENABLED": "0"}):
        try:
            import ray
        except ImportError as error:
            raise UserError("--ray: Ray is not installed", "pip install 'compress-embedders[ray]'") from error
        if ray.is_initialized():
            yield ray
            return
        with _started(ray, options) if options.address is None else _reached(ray, options.address):
            yield ray


@contextmanager
def _started(ray: Any, options: RayOptions) -> Iterator[None]:
    """Start a Ray on this machine for the block. Its files go to a folder of its own, and its token to nobody but its processes."""
    with _set({"RAY_AUTH_TOKEN": _token()}), tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        try:
            cores = options.workers * options.cpus
            ray.init(address="local", num_cpus=cores, include_dashboard=False, _temp_dir=folder, **QUIET)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--ray: Ray does not start ({first_line(error)})") from error
        try:
            yield
        finally:
            ray.shutdown()


@cache
def _token() -> str:
    """The token of all Rays that this process starts; Ray reads it once in a process, so that a second one's would be refused.

    Without one, Ray 2.59 and later make a token and leave it in the user's home.
    """
    return secrets.token_hex(32)


@contextmanager
def _reached(ray: Any, address: str) -> Iterator[None]:
    """Connect to a running Ray for the block."""
    hint = "`ray status` on its head shows whether it runs; RAY_AUTH_MODE=token and RAY_AUTH_TOKEN say its token"
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray itself tries for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, **QUIET)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"--ray {address}: no connection ({first_line(error)})", hint) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for the block, where they are not set."""
    own = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ |= own
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)


def _check_started(ray: Any, workers: list[Any], options: RayOptions) -> None:
    """Wait until a worker is there.

    Raises:
        UserError: none comes, because Ray has no room for one, or because this package is not there.
    """
    from ray.exceptions import RayActorError

    ready, _ = ray.wait([worker.process.remote() for worker in workers], num_returns=1, timeout=START_SECONDS)
    try:
        ray.get(ready)
    except RayActorError as error:
        raise UserError(
            f"--ray: a worker cannot start ({str(error).strip().splitlines()[-1]})",
            "this package has to be installed on every machine of the cluster, in the same version",
        ) from error
    if not ready:
        has = ray.cluster_resources()
        raise UserError(
            f"--ray: no worker started in {START_SECONDS:g} s; each takes {options.cpus} cores and {options.gpus:g} GPUs, "
            f"and Ray has {has.get('CPU', 0):g} cores and {has.get('GPU', 0):g} GPUs",
            "lower --worker-cpus or --worker-gpus",
        )


class _Workers:
    """Actors that do units."""

    def __init__(self, ray: Any, workers: list[Any]) -> None:
        self._ray, self._workers = ray, workers

    def map(self, units: Iterable[Any]) -> Iterator[Any]:
        """Do units and yield what became of them, in their order.

        At most three units a worker are out: two that it has, and one that is done and waits for an earlier one. So neither a
        fast reader nor fast workers fill the memory.
        """
        remaining = enumerate(units)
        working: dict[Any, tuple[int, int]] = {}  # the unit's number and the worker
        done: dict[int, Any] = {}
        turn, more = 0, True
        while True:
            while (
                more and len(working) < AHEAD * len(self._workers) and len(working) + len(done) < (AHEAD + 1) * len(self._workers)
            ):
                number, unit = next(remaining, (-1, None))
                more = number >= 0
                if more:
                    has = [worker for _, worker in working.values()]
                    free = min(range(len(self._workers)), key=has.count)
                    working[self._workers[free].work.remote(unit)] = (number, free)
            if turn in done:
                yield done.pop(turn)
                turn += 1
            elif working:
                for reference in self._ray.wait(list(working), num_returns=1)[0]:
                    number, _ = working.pop(reference)
                    done[number] = self._result(reference, number)
            else:
                return

    def _result(self, reference: Any, number: int) -> Any:
        """Return what became of a unit.

        Raises:
            UserError: its worker died again and again; or what the worker raised.
        """
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return self._ray.get(reference)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, UserError) else error from None
        except RayActorError as error:
            raise UserError(
                f"--ray: unit {number}: its worker died {DEATHS + 1} times ({first_line(error)})",
                "if it ran out of memory: fewer workers on each machine, or smaller parts (--part-texts)",
            ) from error
