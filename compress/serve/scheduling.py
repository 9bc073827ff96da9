"""Which texts are computed next: requests are merged as they arrive, small ones pass large ones, and what may wait is bounded.

Requests are of two classes. Interactive ones are a text, or a few short ones; all others are bulk. In each class the texts that
wait are taken into a window, which is sorted by length, so that batches need little padding; those of large requests in turns, so
that no request holds up another. A window is computed to its end before the next is made, which bounds how long a text waits. Where
little waits, a window is what there is, and nothing waits for others.
"""

from __future__ import annotations

import asyncio
import math
import operator
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from compress.models.embedder import Vectors
from compress.models.text.tokens import Ids

DISPATCH_SECONDS = 0.05
"""Work that is handed to an instance at a time: an interactive request waits for at most two of these."""
INTERACTIVE_SECONDS, BULK_SECONDS = 1.0, 5.0
"""Work that is sorted by length together: an interactive request waits for at most a window before that of its own."""
INTERACTIVE_SHARE = 4
"""Requests of more than one text are interactive if they have at most one such part of a batch's tokens."""
INTERACTIVE_TURNS = 3
"""While bulk waits, it leads one dispatch after so many of interactive requests."""
TAKEN_AT_ONCE = 64
"""Texts that a request adds to a window in its turn."""
ATTEMPTS = 3
"""How often a request is computed, where the computing process fails: with others, then alone."""
FOLLOWED = 0.2
"""Weight of the newest dispatch in the measured speed."""
FULL = 0.75
"""Share of a batch's tokens from which on a dispatch says how fast full ones are."""

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
    left: int = 1
    """Batches that may still be filled, the one that is being filled included."""
    count: int = 0
    """Texts of the batch that is being filled."""
    longest: int = 0
    """Tokens of the longest text of that batch."""

    def add(self, text: Text, budget: int) -> None:
        """Take a text, where it `fits`."""
        length = len(text[0].rows[text[1]])
        if self.texts and not self._fits_batch(length, budget):
            self.left, self.count, self.longest = self.left - 1, 0, 0
        self.texts.append(text)
        self.count, self.longest = self.count + 1, max(self.longest, length)

    def fits(self, length: int, budget: int) -> bool:
        """Return whether a text of so many tokens has room in batches of `budget` tokens, padding counted; the first always has."""
        return not self.texts or self.left > 1 or self._fits_batch(length, budget)

    def _fits_batch(self, length: int, budget: int) -> bool:
        return (self.count + 1) * max(self.longest, length) <= budget

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each text."""
        return [len(job.rows[index]) for job, index in self.texts]

    def ids(self) -> bytes:
        """Return all ids, one text after the other, int32."""
        return np.concatenate([job.rows[index] for job, index in self.texts]).astype(np.int32).tobytes()


class Line:
    """The requests of one class: those that wait, and the window of their texts that is computed next."""

    def __init__(self, seconds: float) -> None:
        """Let a window be `seconds` of work."""
        self.seconds = seconds
        self.jobs: deque[Job] = deque()
        """Requests with texts that are in no window yet."""
        self.window: deque[Text] = deque()
        """Texts of one lane, the shortest first."""
        self._longest_first = False

    def __bool__(self) -> bool:
        """Whether texts wait."""
        return bool(self.window or self.jobs)

    @property
    def lane(self) -> Lane:
        """The lane of what is computed next."""
        return self.window[0][0].lane if self.window else self.jobs[0].lane

    def move(self, dispatch: Dispatch, budget: int, window_tokens: float) -> None:
        """Move texts into a dispatch of their lane until its batches are full.

        A text more would be a batch of its own, which takes several times as long a token. Where a window was taken from its
        longest text on, the next begins with its shortest, so that one dispatch may hold the end of the one and the beginning of
        the other.

        Args:
            dispatch: what is computed next.
            budget: tokens of a batch, padding counted.
            window_tokens: tokens of a new window.
        """
        while self and self.lane == dispatch.lane:
            if not self.window:
                self._fill(window_tokens)
            job, index = self.window[-1 if self._longest_first else 0]
            if not dispatch.fits(len(job.rows[index]), budget):
                return
            dispatch.add(self.window.pop() if self._longest_first else self.window.popleft(), budget)

    def _fill(self, most: float) -> None:
        """Make a new window: texts of the requests of a lane, in turns."""
        lane, tokens, found = self.lane, 0, []
        waiting = deque(job for job in self.jobs if job.lane == lane)
        while waiting and tokens < most:
            job = waiting.popleft()
            stop = min(len(job.rows), job.taken + TAKEN_AT_ONCE)
            for index in range(job.taken, stop):
                found.append((job, index))
                tokens += len(job.rows[index])
            job.taken = stop
            if stop < len(job.rows):
                waiting.append(job)
        left = [job for job in self.jobs if job.taken < len(job.rows)]
        self.jobs = deque([*(job for job in left if not job.taken), *(job for job in left if job.taken)])
        self.window = deque(sorted(found, key=lambda text: len(text[0].rows[text[1]])))
        self._longest_first = not self._longest_first

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Forget requests and their texts."""
        if any(unwanted(job) for job in self.jobs):
            self.jobs = deque(job for job in self.jobs if not unwanted(job))
        if any(unwanted(job) for job, _ in self.window):
            self.window = deque(text for text in self.window if not unwanted(text[0]))


class Scheduler:
    """The requests of one model that wait."""

    def __init__(self, waiting_tokens: int, wait_seconds: float) -> None:
        """Bound what may wait: by tokens, and by the time that computing them would take."""
        self.budget = 1024
        """Tokens of a batch of the runtime."""
        self.speed = 1000.0
        """Tokens a second of one instance, as measured on dispatches that fill it."""
        self.instances = 1
        self.tokens = 0
        """Tokens that wait or are being computed."""
        self.wanted = asyncio.Event()
        """Set while texts wait."""
        self._bounds = waiting_tokens, wait_seconds
        self._interactive, self._bulk = Line(INTERACTIVE_SECONDS), Line(BULK_SECONDS)
        self._again: deque[Job] = deque()
        self._turns = 0
        self._cancelled = False

    @property
    def dispatch_batches(self) -> int:
        """Batches of a dispatch: one, or as many as small ones take to be worth a message."""
        return max(1, int(self.speed * DISPATCH_SECONDS / self.budget))

    @property
    def dispatch_tokens(self) -> int:
        """Tokens of a dispatch that is full."""
        return self.budget * self.dispatch_batches

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
        few = job.tokens <= (self.budget if len(job.rows) == 1 else self.budget // INTERACTIVE_SHARE)
        (self._interactive if few else self._bulk).jobs.append(job)
        self.wanted.set()

    def _leave(self, job: Job) -> None:
        self.tokens -= job.tokens
        self._cancelled = self._cancelled or job.future.cancelled()

    @property
    def has_full_dispatch(self) -> bool:
        """Whether so much waits that an instance can be given its next dispatch before it has finished one."""
        most, found = self.dispatch_tokens, 0
        for line in (self._interactive, self._bulk):
            for job, index in line.window:
                found += len(job.rows[index])
                if found >= most:
                    return True
        for job in (*self._again, *self._interactive.jobs, *self._bulk.jobs):
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
        if self._interactive and not (self._bulk and self._turns >= INTERACTIVE_TURNS):
            self._turns += 1
            lines = [self._interactive, self._bulk]  # a dispatch that is not full yet is filled up with bulk
        else:
            self._turns = 0
            lines = [self._bulk]
        if not lines[0]:
            self.wanted.clear()
            return None
        dispatch = Dispatch(lines[0].lane, [], left=self.dispatch_batches)
        for line in lines:
            line.move(dispatch, self.budget, max(self.dispatch_tokens, self.speed * self.instances * line.seconds))
        return self._started(dispatch)

    def _drop_cancelled(self) -> None:
        """Forget requests that nobody waits for."""
        if not self._cancelled:
            return
        self._cancelled = False
        self._again = deque(job for job in self._again if not job.over)
        for line in (self._interactive, self._bulk):
            line.drop(lambda job: job.over)

    def _started(self, dispatch: Dispatch) -> Dispatch:
        now = time.perf_counter()
        for job, _ in dispatch.texts:
            job.started = job.started or now
            dispatch.attempts[job] = job.attempts
        return dispatch

    def finish(self, dispatch: Dispatch, vectors: Vectors, seconds: float) -> None:
        """Hand out the vectors of a dispatch, float32 [texts, dimension], which took `seconds` to compute."""
        tokens = sum(dispatch.lengths)
        if tokens >= FULL * self.budget:
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
            for line in (self._interactive, self._bulk):
                line.drop(partial(operator.is_, job))
            job.missing = len(job.rows)
            self._again.append(job)
        self.wanted.set()

    def fail_all(self, why: str) -> None:
        """Give up everything that waits."""
        lines = (self._interactive, self._bulk)
        waiting = [job for line in lines for job in (*line.jobs, *(job for job, _ in line.window))]
        for job in (*self._again, *waiting):
            if not job.over:
                job.future.set_exception(ComputeError(why))


def retry_after(full: Full) -> int:
    """Return the seconds after which a client may come again, whole and at least 1."""
    return max(1, math.ceil(full.seconds))
