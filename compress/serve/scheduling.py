"""Which texts are computed next: requests are merged as they arrive, small ones pass large ones, and what may wait is bounded.

Requests are of two classes. Interactive ones have at most a batch of tokens; they are merged in the order in which they came. All
others are bulk: their texts are taken in turns, so that no large request holds up another, into a window that is sorted by length,
so that batches need little padding. A window is computed to its end before the next is made, which bounds how long a text waits.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.models.embedder import Vectors
from compress.models.text.tokens import Ids

DISPATCH_SECONDS = 0.05
"""Work that is handed to an instance at a time: an interactive request waits for at most two of these."""
WINDOW_SECONDS = 3.0
"""Work that is sorted by length together."""
INTERACTIVE_TURNS = 3
"""While bulk waits, it leads one dispatch after so many of interactive requests."""
TAKEN_AT_ONCE = 64
"""Texts that a bulk request adds to a window in its turn."""
ATTEMPTS = 3
"""How often a request is computed, where the computing process fails: with others, then alone."""
FOLLOWED = 0.2
"""Weight of the newest dispatch in the measured speed."""

Lane = tuple[int, int]
"""What texts of one batch have in common: the model's way, and the position of the first pooled token."""


class Full(Exception):
    """There is no room for a request; it may come again in `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"{seconds:.1f}")
        self.seconds = seconds


class ComputeError(Exception):
    """A request that could not be computed."""


@dataclass(eq=False)
class Job:
    """A request that was tokenized."""

    rows: Sequence[Ids]
    """The ids of each text, int64 [length]."""
    lane: Lane
    vectors: Vectors
    """float32 [texts, dimension], filled as texts are computed."""
    future: asyncio.Future[None]
    """Done when all vectors are there; a `ComputeError` where they cannot be."""
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    """When its first text was handed to an instance."""
    taken: int = 0
    """How many of its texts are in a window already."""
    missing: int = 0
    """How many of its vectors are not there yet."""
    attempts: int = 0

    def __post_init__(self) -> None:
        """Count what is missing."""
        self.missing = len(self.rows)
        self.tokens = sum(map(len, self.rows))

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.future.done()


Text = tuple[Job, int]
"""A text of a request."""


@dataclass(eq=False)
class Dispatch:
    """Texts that an instance computes together."""

    lane: Lane
    texts: list[Text]
    attempts: dict[Job, int] = field(default_factory=dict)
    """Which attempt of each request it belongs to."""

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text."""
        return [len(job.rows[index]) for job, index in self.texts]

    def ids(self) -> bytes:
        """Return all ids, one text after the other, int32."""
        return np.concatenate([job.rows[index] for job, index in self.texts]).astype(np.int32).tobytes()


class Scheduler:
    """The requests of one model that wait."""

    def __init__(self, waiting_tokens: int, wait_seconds: float) -> None:
        """Bound what may wait: by tokens, and by the time that computing them would take."""
        self.budget = 1024
        """Tokens of a batch of the runtime; an interactive request has no more."""
        self.speed = 1000.0
        """Tokens a second of one instance, as measured on dispatches that fill it."""
        self.instances = 1
        self.tokens = 0
        """Tokens that wait or are being computed."""
        self.wanted = asyncio.Event()
        """Set while texts wait."""
        self._bounds = waiting_tokens, wait_seconds
        self._interactive: deque[Job] = deque()
        self._bulk: deque[Job] = deque()
        self._again: deque[Job] = deque()
        self._window: list[Text] = []
        self._window_lane: Lane = (0, 0)
        self._turns = 0
        self._cancelled = False

    @property
    def dispatch_tokens(self) -> int:
        """Tokens of a dispatch: at least a batch."""
        return max(self.budget, int(self.speed * DISPATCH_SECONDS))

    def check_room(self, tokens: int = 1) -> None:
        """See that a request of so many tokens may wait.

        Raises:
            Full: too much waits already. A model that has nothing to do takes any request.
        """
        most, seconds = self._bounds
        wait = self.tokens / (self.speed * self.instances)
        if self.tokens and (wait > seconds or self.tokens + tokens > most):
            raise Full(max(1.0, wait - seconds / 2))

    def submit(self, job: Job) -> None:
        """Let a request wait; its future says when it is done.

        Raises:
            Full: see `check_room`.
        """
        self.check_room(job.tokens)
        self.tokens += job.tokens
        job.future.add_done_callback(lambda _: self._leave(job))
        (self._interactive if job.tokens <= self.budget else self._bulk).append(job)
        self.wanted.set()

    def _leave(self, job: Job) -> None:
        self.tokens -= job.tokens
        self._cancelled = self._cancelled or job.future.cancelled()

    @property
    def has_full_dispatch(self) -> bool:
        """Whether so much waits that an instance can be given its next dispatch before it has finished one."""
        most, found = self.dispatch_tokens, 0
        for job, index in reversed(self._window):
            found += len(job.rows[index])
            if found >= most:
                return True
        for job in (*self._again, *self._interactive, *self._bulk):
            found += job.tokens
            if found >= most:
                return True
        return False

    def pick(self) -> Dispatch | None:
        """Return what is computed next; None: nothing waits."""
        self._drop_cancelled()
        if self._again:
            job = self._again.popleft()
            return self._started(Dispatch(job.lane, [(job, index) for index in range(len(job.rows))]))
        bulk_waits = bool(self._window or self._bulk)
        if self._interactive and not (bulk_waits and self._turns >= INTERACTIVE_TURNS):
            self._turns += 1
            return self._started(self._lead_interactive())
        self._turns = 0
        if not bulk_waits:
            self.wanted.clear()
            return None
        self._fill_window()
        dispatch = Dispatch(self._window_lane, [])
        self._add_bulk(dispatch, 0)
        return self._started(dispatch)

    def _lead_interactive(self) -> Dispatch:
        """Merge interactive requests of the lane of the first, then fill up with bulk."""
        dispatch, tokens, passed = Dispatch(self._interactive[0].lane, []), 0, []
        while self._interactive and tokens < self.dispatch_tokens:
            job = self._interactive.popleft()
            if job.lane != dispatch.lane:
                passed.append(job)
                continue
            dispatch.texts += [(job, index) for index in range(len(job.rows))]
            tokens += job.tokens
        self._interactive.extendleft(reversed(passed))
        if self._window and self._window_lane == dispatch.lane:
            self._add_bulk(dispatch, tokens)
        return dispatch

    def _add_bulk(self, dispatch: Dispatch, tokens: int) -> None:
        """Add texts of the window to a dispatch that has `tokens` tokens already; the longest are next to each other."""
        while self._window and tokens < self.dispatch_tokens:
            job, index = self._window.pop()
            dispatch.texts.append((job, index))
            tokens += len(job.rows[index])

    def _fill_window(self) -> None:
        """Make a new window where the last is used up: texts of all bulk requests of a lane, in turns."""
        if self._window:
            return
        self._window_lane, tokens = self._bulk[0].lane, 0
        most = max(self.dispatch_tokens, int(self.speed * self.instances * WINDOW_SECONDS))
        waiting = deque(job for job in self._bulk if job.lane == self._window_lane)
        while waiting and tokens < most:
            job = waiting.popleft()
            stop = min(len(job.rows), job.taken + TAKEN_AT_ONCE)
            for index in range(job.taken, stop):
                self._window.append((job, index))
                tokens += len(job.rows[index])
            job.taken = stop
            if stop < len(job.rows):
                waiting.append(job)
        left = [job for job in self._bulk if job.taken < len(job.rows)]
        self._bulk = deque([*(job for job in left if not job.taken), *(job for job in left if job.taken)])
        self._window.sort(key=lambda text: len(text[0].rows[text[1]]))

    def _drop_cancelled(self) -> None:
        """Forget requests that nobody waits for."""
        if not self._cancelled:
            return
        self._cancelled = False
        for waiting in (self._again, self._interactive, self._bulk):
            if any(job.over for job in waiting):
                kept = [job for job in waiting if not job.over]
                waiting.clear()
                waiting.extend(kept)
        if any(job.over for job, _ in self._window):
            self._window = [text for text in self._window if not text[0].over]

    def _started(self, dispatch: Dispatch) -> Dispatch:
        now = time.perf_counter()
        for job, _ in dispatch.texts:
            job.started = job.started or now
            dispatch.attempts[job] = job.attempts
        return dispatch

    def finish(self, dispatch: Dispatch, vectors: Vectors, seconds: float) -> None:
        """Hand out the vectors of a dispatch, float32 [texts, dimension], which took `seconds` to compute."""
        tokens = sum(dispatch.lengths)
        if tokens >= self.budget:
            self.speed += FOLLOWED * (tokens / max(seconds, 1e-6) - self.speed)
        for (job, index), vector in zip(dispatch.texts, vectors, strict=True):
            if dispatch.attempts[job] != job.attempts:
                continue  # another part of the request has failed meanwhile, and all of it is computed anew
            job.vectors[index] = vector
            job.missing -= 1
            if not job.missing and not job.over:
                job.future.set_result(None)

    def fail(self, dispatch: Dispatch, why: str) -> None:
        """Compute the requests of a failed dispatch anew, each alone, so that one does not take the others with it."""
        for job in dict.fromkeys(job for job, _ in dispatch.texts):
            if job.over or dispatch.attempts[job] != job.attempts:
                continue
            job.attempts += 1
            if job.attempts >= ATTEMPTS:
                job.future.set_exception(ComputeError(why))
                continue
            self._withdraw(job)
            job.missing = len(job.rows)
            self._again.append(job)
        self.wanted.set()

    def _withdraw(self, job: Job) -> None:
        """Take back texts that wait elsewhere."""
        self._window = [text for text in self._window if text[0] is not job]
        if job in self._bulk:
            self._bulk.remove(job)

    def fail_all(self, why: str) -> None:
        """Give up everything that waits."""
        for job in [*self._again, *self._interactive, *self._bulk, *(job for job, _ in self._window)]:
            if not job.over:
                job.future.set_exception(ComputeError(why))

    def retry_after(self, full: Full) -> int:
        """Return the seconds after which a client may come again, whole and at least 1."""
        return max(1, math.ceil(full.seconds))
