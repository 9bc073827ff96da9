"""A computing process as the server sees it: it is started, given texts, and started anew when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from compress.common.children import tied
from compress.common.errors import UserError
from compress.serve import frames
from compress.serve.scheduling import Dispatch, Scheduler

AHEAD = 2
"""Dispatches that an instance has at a time: the next one is there when one is done."""
STUCK_SECONDS = 600.0
"""A dispatch that takes longer ends the process, as nothing will come any more."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds until a process that ended is started anew: twice as many each time, until one is ready."""
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Threads of a computing process sleep while they wait. By default they spin, for which the cores lack that take requests and
tokenize. What the operator has set stays."""


class Watcher(Protocol):
    """What is told about an instance."""

    def computed(self, dispatch: Dispatch, seconds: float, padded: int) -> None:
        """Take note of a finished dispatch."""

    def restarted(self, why: str) -> None:
        """Take note of a process that ended and is started anew."""


@dataclass
class Described:
    """What a computing process says of its model when it is ready."""

    runtime: str
    threads: int | None
    dtype: str | None
    batch_tokens: int
    dimension: int
    speed: float


@dataclass
class _Running:
    process: Process
    dispatched: dict[int, Dispatch] = field(default_factory=dict)
    timers: dict[int, asyncio.TimerHandle] = field(default_factory=dict)


class Instance:
    """Keeps one computing process running and gives it what the scheduler picks."""

    def __init__(self, config: dict[str, Any], scheduler: Scheduler, watcher: Watcher) -> None:
        """Prepare an instance; `run` starts it.

        Args:
            config: what the process opens; see `compress.serve.worker`.
            scheduler: the requests of its model.
            watcher: is told what happens.
        """
        self._config, self._scheduler, self._watcher = config, scheduler, watcher
        self.ready = asyncio.Event()
        """Set while the process takes texts."""
        self.described: Described | None = None
        self.process: Process | None = None
        self._numbers = 0
        self._stopping = False

    async def run(self) -> None:
        """Start the process, and start it anew whenever it ends, until `stop`.

        Raises:
            UserError: the model cannot be opened, the first time.
        """
        pause = FIRST_PAUSE
        while not self._stopping:
            try:
                await self._run_once()
            except UserError:
                if self.described is None:
                    raise
            if self._stopping:
                return
            if self.described is None:
                raise UserError(
                    f"model {self._config['name']!r}: its process ended while it opened the model", "see the lines above"
                )
            pause = FIRST_PAUSE if self.ready.is_set() else min(2 * pause, LONGEST_PAUSE)
            self.ready.clear()
            self._watcher.restarted(f"exit code {self.process.returncode if self.process else None}")
            await asyncio.sleep(pause)

    async def _run_once(self) -> None:
        command = tied([sys.executable, "-m", "compress.serve.worker", json.dumps(self._config)])
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, limit=2**20, env=WAITING | os.environ)
        self.process = process
        assert process.stdin is not None
        assert process.stdout is not None
        running = _Running(process)
        feeding: asyncio.Task[None] | None = None
        try:
            head, _ = await frames.read_async(process.stdout)
            if "refused" in head:
                raise UserError(head["refused"], head["hint"])
            self._open(Described(**head["ready"]))
            free = asyncio.Semaphore(AHEAD)
            feeding = asyncio.create_task(self._feed(running, process.stdin, free))
            while True:
                head, body = await frames.read_async(process.stdout)
                self._take(running, head, body)
                free.release()
                self._scheduler.wanted.set()
        except asyncio.IncompleteReadError:
            return
        finally:
            if feeding is not None:
                feeding.cancel()
            await self._end(running)

    def _open(self, described: Described) -> None:
        self.described = described
        self._scheduler.budget = described.batch_tokens
        self._scheduler.speed = described.speed
        self.ready.set()

    async def _feed(self, running: _Running, stdin: asyncio.StreamWriter, free: asyncio.Semaphore) -> None:
        """Give the process the next texts: one dispatch where it has none, one more where that is a full one."""
        while True:
            await free.acquire()
            while (dispatch := self._next(running)) is None:
                await self._scheduler.wanted.wait()
            self._numbers += 1
            number = self._numbers
            running.dispatched[number] = dispatch
            running.timers[number] = asyncio.get_running_loop().call_later(STUCK_SECONDS, running.process.kill)
            way, pool_from = dispatch.lane
            head = {"id": number, "way": way, "pool_from": pool_from, "lengths": dispatch.lengths}
            stdin.write(frames.packed(head, dispatch.ids()))
            with contextlib.suppress(ConnectionError):  # the process has ended, which the reader sees and answers for
                await stdin.drain()

    def _next(self, running: _Running) -> Dispatch | None:
        if running.dispatched and not self._scheduler.has_full_dispatch:
            self._scheduler.wanted.clear()  # set again by the next request, and when the dispatch that runs is done
            return None
        return self._scheduler.pick()

    def _take(self, running: _Running, head: dict[str, Any], body: bytes) -> None:
        """Hand out what the process has computed."""
        dispatch = running.dispatched.pop(head["id"])
        running.timers.pop(head["id"]).cancel()
        if "error" in head:
            self._scheduler.fail(dispatch, head["error"])
            return
        vectors = np.frombuffer(body, dtype=np.float32).reshape(len(dispatch.texts), -1)
        self._scheduler.finish(dispatch, vectors, head["seconds"])
        self._watcher.computed(dispatch, head["seconds"], head["padded"])

    async def _end(self, running: _Running) -> None:
        """End the process; what it had is computed by another, or by the next."""
        for timer in running.timers.values():
            timer.cancel()
        if running.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                running.process.kill()
        await running.process.wait()
        for dispatch in running.dispatched.values():
            self._scheduler.fail(dispatch, "its process ended")

    async def stop(self) -> None:
        """End the process for good."""
        self._stopping = True
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
