"""A run is killed, the disk is full, the power fails, others run at the same time; and it ends as if nothing had happened.

`make test` draws some moments of a run that measures nothing anew each day; `make torture` takes all. Seeds are in the tests' names.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torture_support import CALIBRATED, RECIPE, Lives, left_in, outcome_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SEED = int(os.environ.get("TORTURE_SEED", datetime.date.today().toordinal()))
FEW = 4


@pytest.fixture(scope="module", params=[pytest.param("measured", marks=pytest.mark.slow), "calibrated"])
def lives(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bert: Path) -> Iterator[Lives]:
    recipe = {"measured": RECIPE, "calibrated": CALIBRATED}[request.param]
    made = Lives(tmp_path_factory.mktemp(request.param), bert, recipe)
    yield made
    made.close()


def some(lives: Lives, what: str, count: int = FEW) -> list[int]:
    """A few of the moments of a run, others each day."""
    return sorted(random.Random(f"{SEED} {what}").sample(range(1, lives.changes + 1), count))


def killed(lives: Lives, moments: list[int], fails: str = "kill", seed: int = 0) -> None:
    for at in moments:
        place = f"{fails} at change {at} of {lives.changes}, seed {seed}"
        root = lives.fresh(f"{fails}-{at}")
        answer = lives.live(root, fails=fails, at=at, seed=seed)
        assert answer["code"] == 137, f"{place}: {answer}"
        lives.check_continues(root, place)


def filled(lives: Lives, moments: list[int]) -> None:
    for at in moments:
        place = f"disk full from change {at} of {lives.changes} on"
        root = lives.fresh(f"full-{at}")
        answer = lives.live(root, fails="full", at=at)
        assert answer["code"] in (0, 2), f"{place}: {answer['said']}"  # 0: only a lock's name or nothing was written after it
        assert "Traceback" not in answer["said"], f"{place}: {answer['said']}"
        if answer["code"] == 2:
            assert "the disk is full" in answer["said"], f"{place}: {answer['said']}"
            assert str(root) in answer["said"], f"{place}: {answer['said']}"
        assert [name for name in left_in(root) if name.endswith(".writing")] == [], place
        lives.check_continues(root, place)


def shared(lives: Lives, count: int, number: int) -> None:
    root = lives.fresh(f"together-{number}")
    answers = lives.together(root, count)
    codes = sorted(answer["code"] for answer in answers)
    assert codes[0] == 0, answers
    for answer in answers:
        assert answer["code"] == 0 or ("in use by pid " in answer["said"] and answer["code"] == 2), answer
    assert outcome_of(root / "out") == lives.wanted
    assert left_in(root) == []
    shutil.rmtree(root)


def test_a_run_killed_at_some_moments_continues(lives: Lives) -> None:
    killed(lives, some(lives, "kill"))


def test_a_power_cut_at_some_moments_loses_nothing_that_was_done(lives: Lives) -> None:
    killed(lives, some(lives, "power"), "power", SEED)


def test_a_full_disk_is_said_and_a_run_goes_on_once_there_is_room(lives: Lives) -> None:
    filled(lives, some(lives, "full"))


def test_of_two_equal_runs_one_works_and_the_other_says_who(lives: Lives) -> None:
    shared(lives, 2, 0)


def test_of_two_equal_runs_one_waits_if_it_is_asked_to(lives: Lives) -> None:
    root = lives.fresh("waiting")
    answers = lives.together(root, 2, wait=True)
    assert [answer["code"] for answer in answers] == [0, 0], answers
    assert sum("waiting" in answer["said"] for answer in answers) == 1, answers
    assert outcome_of(root / "out") == lives.wanted
    assert left_in(root) == []


@pytest.mark.torture
def test_a_run_killed_at_every_change_continues(lives: Lives) -> None:
    killed(lives, list(range(1, lives.changes + 1)))
    print(f"{lives.changes} kills")


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(2))
def test_a_power_cut_at_every_change_loses_nothing_that_was_done(lives: Lives, seed: int) -> None:
    killed(lives, list(range(1, lives.changes + 1)), "power", seed)


@pytest.mark.torture
def test_the_disk_is_full_at_every_write(lives: Lives) -> None:
    filled(lives, list(range(1, lives.changes + 1)))


@pytest.mark.torture
@pytest.mark.parametrize("number", range(10))
def test_of_three_equal_runs_one_works(lives: Lives, number: int) -> None:
    shared(lives, 3, number)


@pytest.mark.torture
def test_a_run_killed_again_and_again_continues(lives: Lives) -> None:
    draw = random.Random(SEED)
    for number in range(10):
        root = lives.fresh(f"again-{number}")
        moments = []
        for _ in range(5):
            moments.append(draw.randint(1, lives.changes))
            if lives.live(root, fails="kill", at=moments[-1])["code"] != 137:
                break
        lives.check_continues(root, json.dumps({"seed": SEED, "moments": moments}))
