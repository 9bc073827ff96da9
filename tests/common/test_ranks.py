"""Ranks that meet, work for the first one and end with it; here each is a thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from compress.common import ranks
from compress.common.errors import ElsewhereError, UserError
from compress.common.failures import told
from compress.common.ranks import Follower, LostRankError, Place, following, leading

FIRST, SECOND, THIRD = (Place(rank, 3, rank, 3) for rank in range(3))
ABOUT = {"recipe": "a"}


@pytest.fixture(autouse=True)
def launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(listening.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(ranks, "BLAME_SECONDS", 0.5)


Others = list[Future[Any]]


@pytest.fixture
def others() -> Iterator[Callable[..., Others]]:
    """Start the second and the third rank; each returns what the first one does."""
    with ThreadPoolExecutor(2) as threads:

        def follow(place: Place, about: dict[str, str]) -> Any:
            with following(place, about) as first:
                return first.until_it_ends()

        def start(second: dict[str, str] = ABOUT, third: dict[str, str] = ABOUT) -> Others:
            return [threads.submit(follow, SECOND, second), threads.submit(follow, THIRD, third)]

        yield start


seen: list[tuple[int, str]] = []
go_on = threading.Event()


def note(what: str, first: Follower) -> None:
    seen.append((first.place.rank, what))


def fail_on_the_second(kind: type[Exception], first: Follower) -> None:
    if first.place.rank == 1:
        go_on.wait(10)
        raise kind("no room")
    raise LostRankError("connection closed by peer")


def die_on_the_second(_: Any, first: Follower) -> None:
    if first.place.rank == 1:
        first._connection.close()


def wait_until_the_first_is_gone(_: Any, first: Follower) -> None:
    while True:
        first.check()


def test_calls_reach_all_and_what_is_returned_too(others: Callable[..., Others], tmp_path: Path) -> None:
    followers = others()
    seen.clear()
    with leading(FIRST, ABOUT, tmp_path) as leader:
        leader.call(note, "x")
        leader.gathered()
        assert sorted(seen) == [(1, "x"), (2, "x")]
        leader.end({"record": 1})
    assert [follower.result(10) for follower in followers] == [{"record": 1}] * 2
    assert list(tmp_path.iterdir()) == []


def test_a_program_may_meet_again(others: Callable[..., Others], tmp_path: Path) -> None:
    for number in range(2):
        followers = others()
        with leading(FIRST, ABOUT, tmp_path) as leader:
            leader.end(number)
        assert [follower.result(10) for follower in followers] == [number] * 2


def test_another_recipe_is_refused(others: Callable[..., Others], tmp_path: Path) -> None:
    followers = others(third={"recipe": "b"})
    said = r"rank 2 of 3 on .* was started with another recipe: b; rank 0 has a"
    with pytest.raises(UserError, match=said), leading(FIRST, ABOUT, tmp_path):
        pass
    for follower in followers:
        with pytest.raises(UserError, match=f"rank 0 ended: {said}"):
            follower.result(10)


def test_a_folder_that_is_not_shared_is_refused(
    others: Callable[..., Others], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(ranks, "_sees", lambda path: not path.is_file())
    others()
    said = r"rank [12] of 3 on .* does not see what rank 0 writes into"
    with pytest.raises(UserError, match=said) as caught, leading(FIRST, ABOUT, tmp_path):
        pass
    assert "--runs" in caught.value.hint


@pytest.mark.parametrize("kind", [ValueError, UserError])
def test_the_rank_that_failed_first_is_named(others: Callable[..., Others], tmp_path: Path, kind: type[Exception]) -> None:
    go_on.clear()
    second, third = others()

    def work() -> None:
        with leading(FIRST, ABOUT, tmp_path) as leader:
            leader.call(fail_on_the_second, kind)
            leader.check(wait_seconds=0.2)  # the third one says that it lost another; that is not the cause
            go_on.set()
            leader.blame(LostRankError("connection reset"))

    with pytest.raises(UserError, match=r"^rank 1 of 3 on .*: no room"):
        work()
    with pytest.raises(UserError, match="no room"):
        second.result(10)
    with pytest.raises(ElsewhereError, match=r"rank 0 ended: rank 1 of 3 on .*: no room"):
        third.result(10)


def test_a_rank_that_is_gone_ends_all(others: Callable[..., Others], tmp_path: Path) -> None:
    second, third = others()

    def work() -> None:
        with leading(FIRST, ABOUT, tmp_path) as leader:
            leader.call(die_on_the_second, None)
            leader.gathered()

    with pytest.raises(UserError, match=r"rank 1 of 3 on .*: is gone") as caught:
        work()
    assert "continues at its last checkpoint" in caught.value.hint
    with pytest.raises(UserError, match=r"rank 1 of 3 on .*: is gone"):
        third.result(10)
    with pytest.raises(UserError, match="rank 0 is gone"):
        second.result(10)


def test_the_first_rank_that_is_gone_ends_all(others: Callable[..., Others], tmp_path: Path) -> None:
    second, third = others()
    with leading(FIRST, ABOUT, tmp_path) as leader:
        leader.call(wait_until_the_first_is_gone, None)
        for member in leader._members:
            member.connection.close()
    for follower in (second, third):
        with pytest.raises(UserError, match="rank 0 is gone") as caught:
            follower.result(10)
        assert told(caught.value)[0] == 2


@pytest.mark.parametrize(("error", "code"), [(UserError("x"), 2), (ZeroDivisionError("x"), 70), (KeyboardInterrupt(), 130)])
def test_all_ranks_end_with_the_first_ones_exit_code(
    others: Callable[..., Others], tmp_path: Path, error: BaseException, code: int
) -> None:
    followers = others()
    with pytest.raises(type(error)), leading(FIRST, ABOUT, tmp_path):
        raise error
    assert [told(follower.exception(10))[0] for follower in followers] == [code] * 2  # type: ignore[arg-type]


def test_the_environment_says_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ranks.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert Place.own() is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Place.own() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="WORLD_SIZE=4 says that there are several ranks, and RANK is not set"):
        Place.own()
    rest = {"RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    for name, value in rest.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "no")
    with pytest.raises(UserError, match="MASTER_PORT is no"):
        Place.own()
    monkeypatch.setenv("MASTER_PORT", "1")
    assert Place.own() == Place(3, 4, 1, 2)
