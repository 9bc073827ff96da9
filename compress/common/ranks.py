"""Ranks: processes on one or several machines that were started with the same command, by torchrun or Ray Train, to share a run.

The first rank is the run: it has the lock, does every step and writes every file. The others wait for it, do their part of what it
calls on all of them, and end as it ends. Each of them keeps one connection to it. The system closes that connection when a process
dies, however it dies, so nobody waits for a dead rank and no heartbeat can be late.
"""

from __future__ import annotations

import ipaddress
import json
import os
import pickle
import secrets
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from compress.common.errors import ElsewhereError, UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of the environment by which torchrun and Ray Train say who is who."""
START_SECONDS = 300.0
"""How long to wait for the other ranks at the start."""
LOOK_SECONDS = 10.0
"""How long a file may take to be seen on another machine."""
BLAME_SECONDS = 5.0
"""How long to look for the rank that failed first, once one has failed only because it lost another."""
AGAIN = "start all ranks again with the same command: the run continues at its last checkpoint"
# A machine that lost power closes no connection: after 30 s of silence it is asked six times, every ten seconds.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))


@dataclass(frozen=True)
class Place:
    """This process's place among the ranks."""

    rank: int
    ranks: int
    """Number of ranks, on all machines."""
    local_rank: int
    """Number of this rank on its machine: that of its GPU."""
    local_ranks: int
    """Number of ranks on this machine."""

    @classmethod
    def own(cls) -> Place | None:
        """Return the place that the environment says; None where the process is alone.

        Raises:
            UserError: the environment says only half of it.
        """
        said = {name: os.environ.get(name, "") for name in VARIABLES}
        if said["WORLD_SIZE"] in ("", "1"):
            return None
        for name, value in said.items():
            if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
                raise UserError(
                    f"WORLD_SIZE={said['WORLD_SIZE']} says that there are several ranks, and {name} is {value or 'not set'}",
                    "start them with torchrun or Ray Train (docs/cluster.md), or unset WORLD_SIZE",
                )
        return cls(*(int(said[name]) for name in VARIABLES[:4]))

    def __str__(self) -> str:
        """Return who it is, for people."""
        return f"rank {self.rank} of {self.ranks} on {socket.gethostname()}"


@dataclass(frozen=True)
class Failure:
    """What ended a rank's part of a call."""

    message: str
    hint: str = ""
    first: bool = True
    """Whether the cause is its own; else it lost another rank, which is to blame."""


class LostRankError(ValueError):
    """A part of a call failed because another rank is gone; what that one says is the cause."""


@dataclass(frozen=True)
class _Hello:
    who: str
    about: Mapping[str, str]


@dataclass(frozen=True)
class _Look:
    path: Path


@dataclass(frozen=True)
class _Call:
    function: Callable[..., None]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _Ending:
    """How the first rank ended: what it returned, or why not and with which exit code."""

    returned: Any = None
    failure: Failure | None = None
    code: int = 0


@dataclass
class _Member:
    """Another rank, as the first one sees it."""

    who: str
    connection: Connection
    answers: list[Any] = field(default_factory=list)
    failure: Failure | None = None
    failed_at: float = 0.0


class Leader:
    """The other ranks, as the first one sees them."""

    def __init__(self, place: Place, host: str, members: list[_Member]) -> None:
        """`host`: the address at which the other ranks reach this one."""
        self.place, self.host, self._members = place, host, members

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function on every other rank, as `function(*arguments, follower)`. Everything is pickled."""
        self.check()
        self._tell(_Call(function, arguments))

    def gathered(self) -> list[Any]:
        """Wait for one answer of every other rank, and return them.

        Raises:
            UserError: a rank failed or is gone.
        """
        while not all(member.answers for member in self._members):
            self.check(wait_seconds=0.5)
        return [member.answers.pop(0) for member in self._members]

    def check(self, wait_seconds: float = 0.0) -> None:
        """See that every other rank is still there.

        Args:
            wait_seconds: how long to wait for news.

        Raises:
            UserError: a rank failed or is gone.
        """
        alive = {member.connection: member for member in self._members if member.failure is None}
        for ready in wait(list(alive), wait_seconds):
            member = alive[ready]  # type: ignore[index]
            try:
                said = _received(member.connection)
            except (EOFError, OSError):
                said = Failure("is gone; it was killed, or its machine was", AGAIN)
            if isinstance(said, Failure):
                member.failure, member.failed_at = said, time.monotonic()
            else:
                member.answers.append(said)
        failed = [member for member in self._members if member.failure is not None]
        for member in sorted(failed, key=lambda one: (not one.failure.first, one.failed_at)):  # type: ignore[union-attr]
            assert member.failure is not None
            if member.failure.first or time.monotonic() > member.failed_at + BLAME_SECONDS:
                raise UserError(f"{member.who}: {member.failure.message}", member.failure.hint)

    def blame(self, error: LostRankError) -> None:
        """Raise what the rank says that this one lost, or in the end the error itself."""
        ends = time.monotonic() + BLAME_SECONDS
        while time.monotonic() < ends:
            self.check(wait_seconds=0.1)
        raise error

    def check_same(self, about: Mapping[str, str]) -> None:
        """See that every rank was started with the same.

        Raises:
            UserError: a rank was not.
        """
        for hello in self.gathered():
            for name, value in about.items():
                other = hello.about.get(name)
                if other != value:
                    raise UserError(
                        f"{hello.who} was started with another {name}: {other}; rank 0 has {value}",
                        "start every rank with the same command and the same packages",
                    )

    def check_shared(self, folder: Path) -> None:
        """See that every rank sees what this one writes into a folder.

        Raises:
            UserError: a rank does not.
        """
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ranks-") as file:
            self._tell(_Look(Path(file.name)))
            for member, sees in zip(self._members, self.gathered(), strict=True):
                if not sees:
                    raise UserError(
                        f"{member.who} does not see what rank 0 writes into {folder}",
                        "the folder of runs has to lie on a file system that all machines share; --runs names it",
                    )

    def end(self, returned: Any) -> None:
        """Let the other ranks return what this one returns."""
        self._end(_Ending(returned))

    def fail(self, error: BaseException) -> None:
        """Let the other ranks fail as this one does."""
        self._end(_Ending(failure=_failure(error), code=_code(error)))

    def close(self) -> None:
        """Leave the other ranks."""
        for member in self._members:
            member.connection.close()

    def _tell(self, said: Any) -> None:
        for member in self._members:
            with suppress(OSError):  # one that is gone is found by `check`
                _send(member.connection, said)

    def _end(self, ending: _Ending) -> None:
        """Tell the other ranks, and wait a moment for them to go: a launcher kills those that are there when this one is not."""
        self._tell(ending)
        ends = time.monotonic() + BLAME_SECONDS
        left = [member.connection for member in self._members]
        while left and time.monotonic() < ends:
            ready = wait(left, 0.5)
            for connection in [one for one in left if one in ready]:
                try:
                    _received(connection)
                except (EOFError, OSError):
                    left.remove(connection)


class Follower:
    """The first rank, as another one sees it."""

    def __init__(self, place: Place, host: str, connection: Connection) -> None:
        """`host`: the address at which the first rank is reached."""
        self.place, self.host, self._connection = place, host, connection

    def check(self) -> None:
        """See that the first rank is still there.

        Raises:
            UserError: it is gone, or it has ended, with its error.
        """
        with self._lost():
            waits = self._connection.poll()
        if waits:
            self._ended(self._heard())

    def until_it_ends(self) -> Any:
        """Do what the first rank calls, until it ends; return what it returned.

        Raises:
            UserError: it is gone, or it has ended with an error; or a call failed here.
        """
        while True:
            said = self._heard()
            if isinstance(said, _Look):
                self._answer(_sees(said.path))
            elif isinstance(said, _Call):
                self._do(said)
            else:
                return self._ended(said)

    def _do(self, call: _Call) -> None:
        try:
            call.function(*call.arguments, self)
        except LostRankError as error:
            self._answer(Failure(str(error), first=False))  # the first rank finds who is to blame, and says so
            return
        except UserError as error:
            self._answer(Failure(error.message, error.hint))
            raise
        except ValueError as error:
            self._answer(Failure(str(error)))
            raise UserError(f"{self.place}: {error}") from error
        except Exception as error:
            self._answer(Failure(f"{type(error).__name__}: {error}"))
            raise
        self._answer(None)

    def _answer(self, said: Any) -> None:
        with self._lost():
            _send(self._connection, said)

    def _heard(self) -> Any:
        with self._lost():
            return _received(self._connection)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise UserError(f"{self.place}: rank 0 is gone; it was killed, or its machine was", AGAIN) from error

    @staticmethod
    def _ended(ending: _Ending) -> Any:
        if ending.failure is None:
            return ending.returned
        raise ElsewhereError(f"rank 0 ended: {ending.failure.message}", ending.failure.hint, ending.code)


@contextmanager
def leading(place: Place, about: Mapping[str, str], folder: Path) -> Iterator[Leader]:
    """Meet the other ranks, as the first of them; what the block raises ends them too.

    Args:
        place: this process's.
        about: what has to be the same on every rank: a text by its name, for messages.
        folder: the folder that all ranks have to share.

    Raises:
        UserError: a rank does not come, was started with something else or does not share the folder.
    """
    with _Door(place) as door:
        leader = Leader(place, door.host, [door.next() for _ in range(place.ranks - 1)])
    try:
        leader.check_same(about)
        leader.check_shared(folder)
        yield leader
    except BaseException as error:
        leader.fail(error)
        raise
    finally:
        leader.close()


@contextmanager
def following(place: Place, about: Mapping[str, str]) -> Iterator[Follower]:
    """Meet the first rank.

    Raises:
        UserError: it does not answer.
    """
    with _meeting(place) as (store, key):
        said = json.loads(store.get(key))
        host = os.environ["MASTER_ADDR"] if _is_loopback(said["host"]) else str(said["host"])
        store.set(f"{key}/{place.rank}", "ready")
        try:
            connection = Client((host, said["port"]), authkey=bytes.fromhex(said["key"]))
        except (OSError, EOFError, AuthenticationError) as error:
            raise UserError(
                f"{place}: rank 0 cannot be reached at {host}, port {said['port']} ({error})",
                "the machines have to reach each other at all ports",
            ) from error
    with connection:
        _keep_alive(connection)
        _send(connection, _Hello(str(place), about))
        yield Follower(place, host, connection)


class _Door:
    """Where the first rank waits for the others. Who comes has to know a key that only ranks are told."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.host = _address_towards(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))

    def __enter__(self) -> _Door:
        master = os.environ["MASTER_ADDR"]
        # Where the name of this machine means a loopback address here, the others know it by an address that is not known here.
        anywhere = _is_loopback(self.host) and master not in ("localhost", self.host)
        key = secrets.token_bytes(32)
        self._listener = Listener(("" if anywhere else self.host, 0), backlog=self._place.ranks, authkey=key)
        with _meeting(self._place) as (store, name):
            store.set(name, json.dumps({"host": self.host, "port": self._listener.address[1], "key": key.hex()}))
            others = [f"{name}/{rank}" for rank in range(1, self._place.ranks)]
            store.wait(others)
            for spent in (name, *others):  # a program may run several recipes
                store.delete_key(spent)
        return self

    def next(self) -> _Member:
        """Return the next rank that comes."""
        while True:
            try:
                connection = self._listener.accept()
            except (AuthenticationError, EOFError, ConnectionError):
                continue  # no rank of ours
            _keep_alive(connection)
            try:
                hello: _Hello = _received(connection)
            except (EOFError, OSError) as error:
                raise UserError(f"{self._place}: another rank came and is gone", AGAIN) from error
            member = _Member(hello.who, connection)
            member.answers.append(hello)
            return member

    def __exit__(self, *_: object) -> None:
        self._listener.close()


@contextmanager
def _meeting(place: Place) -> Iterator[tuple[Any, str]]:
    """Hand out the store that the launcher's variables name, and the key under which the first rank says where it is.

    Raises:
        UserError: the store is not there, or a rank does not come.
    """
    from torch.distributed.rendezvous import rendezvous

    key = f"compress/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # how often the launcher started all ranks again
    where = f"env://?rank={place.rank}&world_size={place.ranks}"
    try:
        yield next(iter(rendezvous(where, timeout=timedelta(seconds=START_SECONDS))))[0], key
    except RuntimeError as error:  # torch's network errors are; they say more than one line
        at = f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"
        raise UserError(
            f"{place}: the ranks did not meet in {START_SECONDS:g} s at {at} ({str(error).splitlines()[0]})",
            "start every rank with the same command (docs/cluster.md)",
        ) from error


def _sees(path: Path) -> bool:
    ends = time.monotonic() + LOOK_SECONDS
    while not path.exists() and time.monotonic() < ends:
        time.sleep(0.1)
    return path.exists()


def _address_towards(host: str, port: int) -> str:
    """Return this machine's address on the way to another; nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((host, port))
            return str(way.getsockname()[0])
    except OSError as error:
        raise UserError(f"MASTER_ADDR={host}: is no machine that can be reached ({error.strerror})") from error


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _send(connection: Connection, said: Any) -> None:
    # Not `Connection.send`: torch makes that pass tensors in shared memory, which another machine does not have.
    connection.send_bytes(pickle.dumps(said, protocol=pickle.HIGHEST_PROTOCOL))


def _received(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())  # from a rank: who comes has to know the key


def _keep_alive(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            same.setsockopt(socket.IPPROTO_TCP, option, value)


def _failure(error: BaseException) -> Failure:
    from compress.common.failures import in_our_words

    known = in_our_words(error)
    if known is not None:
        return Failure(known.message, known.hint)
    if isinstance(error, KeyboardInterrupt):
        return Failure("it was stopped", AGAIN)
    return Failure(f"a defect of this program: {type(error).__name__}: {error}", "its log is on the machine of rank 0")


def _code(error: BaseException) -> int:
    from compress.common.entry import DEFECT, Stopped
    from compress.common.failures import WRONG, in_our_words

    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args[0] if isinstance(error, Stopped) and error.args else signal.SIGINT)
    return WRONG if in_our_words(error) is not None else DEFECT
