"""Workers of Ray: the same parts and scores as without, whoever is killed."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scale_support import (
    always_dying,
    contents,
    deadly_encoder,
    doubling,
    failing,
    read_parts,
    some_texts,
    static_model,
    write_lines,
)

from compress.common.errors import UserError
from compress.measure.evaluate import EvaluationOptions, evaluate
from compress.scale import corpora, ray_workers
from compress.scale import tasks as scale_tasks
from compress.scale.corpora import CorpusOptions, encode_corpus
from compress.scale.ray_workers import connected
from compress.scale.tasks import evaluate_many
from compress.scale.units import RayOptions, map_units, working

pytest.importorskip("ray", reason="the extra `ray` is not installed")
PATHS = ":".join(path for path in sys.path if path)
TWO = RayOptions(workers=2)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a Ray with two cores that all tests share; this process is connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)  # of the workers
        with connected(TWO) as ray:
            yield str(ray.get_runtime_context().gcs_address)


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(static_model(tmp_path / "static"))


def test_units_come_in_their_order_and_few_are_out(address: str) -> None:
    taken: list[int] = []

    def units() -> Iterator[int]:
        for number in range(12):
            taken.append(number)
            yield number

    made = map_units(doubling, units(), TWO)
    assert next(made) == 0
    assert len(taken) <= 6
    assert list(made) == [2 * number for number in range(1, 12)]


def test_what_a_worker_raises_is_raised_here(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="unit 3: no") as caught:
        list(map_units(failing, [3], RayOptions()))
    assert caught.value.hint == "another one"
    monkeypatch.setattr(ray_workers, "DEATHS", 1)
    with pytest.raises(UserError, match="unit 0: its worker died 2 times"):
        list(map_units(always_dying, [1], RayOptions()))


def test_a_machine_without_the_package_is_named(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "only_here.py").write_text("def make():\n    return int\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"a worker cannot start .*No module named 'only_here'") as caught:
        list(map_units(importlib.import_module("only_here").make, [1], RayOptions()))
    assert "installed on every machine" in caught.value.hint


def test_more_cores_than_ray_has_are_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "START_SECONDS", 0.5)
    with pytest.raises(UserError, match="each takes 99 cores and 0 GPUs, and Ray has 2 cores"):
        list(map_units(doubling, [1], RayOptions(cpus=99)))
    with pytest.raises(UserError, match="at least one worker"):
        list(map_units(doubling, [1], RayOptions(workers=0)))


def test_workers_that_are_killed_leave_the_same_parts(
    address: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(100))
    options = CorpusOptions(part_texts=8)
    encode_corpus(model, lines, tmp_path / "here", options)
    deaths = Path(f"{model}-deaths")
    deaths.mkdir()
    monkeypatch.setattr(corpora, "make_encoder", deadly_encoder)
    encode_corpus(model, lines, tmp_path / "there", options, ray=TWO)
    assert len(list(deaths.iterdir())) == 3
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


DRIVER = """
import sys
from pathlib import Path
from scale_support import slow_encoder
from compress.scale import corpora
from compress.scale.units import RayOptions
corpora.make_encoder = slow_encoder
options = corpora.CorpusOptions(part_texts=8)
corpora.encode_corpus(sys.argv[1], sys.argv[2], Path(sys.argv[3]), options, ray=RayOptions(address=sys.argv[4], workers=2))
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_behind_the_last_part(address: str, model: str, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "t.txt", some_texts(100))
    encode_corpus(model, lines, tmp_path / "here", CorpusOptions(part_texts=8))
    there = tmp_path / "there"
    command = [sys.executable, "-c", DRIVER, model, lines, str(there), address]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    driver = subprocess.Popen(command, env=environment)
    ends = time.monotonic() + 60
    while len(list(there.glob("part-*.parquet"))) < 3 and time.monotonic() < ends:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    assert 3 <= len(list(there.glob("part-*.parquet"))) < 13
    subprocess.run(command, env=environment, check=True)
    assert contents(there) == contents(tmp_path / "here")
    ours, theirs = read_parts(tmp_path / "here"), read_parts(there)
    assert theirs["id"].to_pylist() == list(range(100))
    np.testing.assert_allclose(theirs["vector"].to_pylist(), ours["vector"].to_pylist(), atol=1e-6)


@pytest.mark.parametrize("by", ["this process", pytest.param("ray", marks=pytest.mark.slow)])
def test_scores_are_those_of_one_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, bert: Path, by: str
) -> None:
    if by == "ray":
        request.getfixturevalue("address")
    else:
        monkeypatch.setattr(scale_tasks, "working", lambda make_worker, ray: working(make_worker))
    options = EvaluationOptions(device="cpu")
    tasks = ["MiniSTS", "MiniPairClassification"]
    said: list[str] = []
    there = evaluate_many(str(bert), tasks, options, ray=RayOptions(), say=said.append)
    here = evaluate(str(bert), tasks, options, say=lambda _: None)
    assert [row.variant for row in there.tasks] == [row.variant for row in here.tasks]
    assert there.mteb.keys() == here.mteb.keys()
    assert [line.partition(":")[0] for line in said] == [f"{bert.name} {number}/2 {task}" for number, task in enumerate(tasks, 1)]
    with pytest.raises(UserError, match="--vector-formats: are scored in one process"):
        evaluate_many(str(bert), tasks, EvaluationOptions(vector_formats=["int8"]), ray=TWO)
    with pytest.raises(UserError, match="is a server"):
        evaluate_many("http://127.0.0.1:1", tasks, ray=TWO)


REFUSED = """
from compress.scale.units import RayOptions, map_units
list(map_units(int, [1], RayOptions("127.0.0.1:1")))
"""


def test_a_ray_that_is_not_there_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False)
    assert "--ray 127.0.0.1:1: no connection ([Errno 111] Connection refused)" in done.stderr


TWICE = """
from compress.scale.ray_workers import connected
from compress.scale.units import RayOptions
for _ in range(2):
    with connected(RayOptions(workers=1)) as ray:
        print(ray.get(ray.remote(lambda: 7).remote()))
"""


@pytest.mark.slow
def test_a_process_may_start_ray_again() -> None:
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7", "7"], done.stderr
