"""A training as one object that can be sent to processes, and the processes that run it."""

from __future__ import annotations

import copy
import os
import queue
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from compress.common.children import end_with_parent
from compress.common.ranks import Follower, Leader, LostRankError, Place
from compress.methods.distill.batches import TokenTexts
from compress.methods.distill.checkpoints import WHOLE, read_curve
from compress.methods.distill.hidden import HiddenStates, followed
from compress.methods.distill.settings import DistillSettings
from compress.methods.distill.static_student import StaticStudent
from compress.methods.distill.trainable import trainable
from compress.methods.distill.training import TrainingData, train
from compress.models.files.shards import write_tensors
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of
from compress.models.opened import OpenModel

WEIGHTS = "student.safetensors"
WAIT_SECONDS = 0.5
# Words of the errors that gloo, NCCL and torch's store raise in a process when another one is gone.
_LOST = ("gloo", "NCCL", "DistBackendError", "DistNetworkError", "DistStoreError", "onnection reset", "onnection closed")
# The kinds of errors whose messages are for users; a process that failed names the kind before the message.
_KINDS = re.compile(r"^(ValueError|compress\.common\.errors\.\w+): ")
# What launchers set for a training in their own processes: where the store is, and on which device accelerate works.
_LAUNCHERS = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "ACCELERATE_TORCH_DEVICE")


@dataclass(frozen=True)
class Job:
    """A student, what it learns from, and how."""

    settings: DistillSettings
    student: OpenModel
    published: ModelFolder
    """The original model that the student was pruned from; needed for hidden states."""
    texts: TokenTexts
    targets: Path
    """The teacher's vectors of the texts, float32 [texts, width], as a numpy file that every process maps."""
    held_out: TokenTexts
    held_out_targets: np.ndarray
    """The teacher's vectors of the held-out texts, float32 [texts, width]."""
    neighbours: np.ndarray | None
    """Texts that belong in the same batch as each text, int64 [texts, n]; None: none."""
    folder: Path
    """Where checkpoints are kept, and the trained weights in the end, as `WEIGHTS`."""
    device: str

    @property
    def processes(self) -> int:
        """Number of processes: as set, or one per GPU."""
        return self.settings.processes or (torch.cuda.device_count() if self.device == "cuda" else 1)

    def data(self) -> TrainingData:
        """Return the texts with the teacher's vectors mapped from their file."""
        targets = np.load(self.targets, mmap_mode="r")
        return TrainingData(self.texts, targets, self.held_out, self.held_out_targets, self.neighbours)


@dataclass(frozen=True)
class _Seats:
    """The processes of a training that are started here, among all of them."""

    host: str
    """Address of the first process of all."""
    port: int
    processes: int
    """Number of all processes."""
    first: int = 0
    """Number of the first one that is started here, among all."""
    first_local: int = 0
    """Its number on this machine: that of its GPU."""
    local: int = 1
    """Number of processes on this machine."""
    here: int = 1
    """Number of processes that are started here."""

    @classmethod
    def of(cls, place: Place, host: str, port: int) -> _Seats:
        """Return the one seat of a rank."""
        return cls(host, port, place.ranks, first=place.rank, first_local=place.local_rank, local=place.local_ranks)


def learn(job: Job, say: Callable[[str], None], ranks: Leader | None = None) -> list[dict[str, float]]:
    """Run a job in as many processes as it asks for, or one on each rank, and return the curve.

    Raises:
        ValueError: the student or the texts do not allow it, or a process failed.
        UserError: a rank failed or is gone.
    """
    if ranks is not None:
        _learn_on_ranks(job, say, ranks)
    elif (place := Place.own()) is not None:
        raise ValueError(f"this is {place}, and only `compress run` shares a training among ranks; start it without torchrun")
    elif job.processes == 1:
        _learn(job, job.device, say)
    else:
        count = job.processes
        _learn_here(job, _Seats("127.0.0.1", _free_port(), count, local=count, here=count), say)
    return read_curve(job.folder)


def _learn_on_ranks(job: Job, say: Callable[[str], None], ranks: Leader) -> None:
    """Run a job in one process on each rank, as the first of them."""
    job = replace(job, targets=job.targets.absolute(), folder=job.folder.absolute())
    port = _free_port()
    ranks.call(_take_part, job, port, job.published.fingerprint)
    try:
        _learn_here(job, _Seats.of(ranks.place, ranks.host, port), say, ranks.check)
    except LostRankError as error:
        ranks.blame(error)
    ranks.gathered()


def _take_part(job: Job, port: int, fingerprint: str, first: Follower) -> None:
    """Run a job in one process of this rank; the first rank calls this on all others.

    Raises:
        ValueError: this machine lacks something, or the process failed.
        UserError: the first rank is gone.
    """
    place, model = first.place, job.published
    if not job.targets.exists():
        raise ValueError(f"{job.targets} is not there; all machines have to share the folder of runs")
    # Only once on each machine, because it reads all weights.
    if place.local_rank == 0 and (not model.path.is_dir() or replace(model).fingerprint != fingerprint):
        raise ValueError(f"{model.path.absolute()} does not hold the files of {model.name} that rank 0 has there")
    _learn_here(job, _Seats.of(place, first.host, port), lambda _: None, first.check)


def _learn_here(job: Job, seats: _Seats, say: Callable[[str], None], check: Callable[[], None] = lambda: None) -> None:
    """Run a job in processes of its own; `check` is called while they work, and ends them by what it raises.

    Raises:
        LostRankError: a process lost another one.
        ValueError: a process failed, or was killed.
    """
    lines: Any = get_context("spawn").Queue()
    workers = spawn(_work, args=(job, seats, lines), nprocs=seats.here, join=False)  # type: ignore[no-untyped-call]
    try:
        while not workers.join(timeout=WAIT_SECONDS):
            _pass_on(lines, say)
            check()
    except (ProcessRaisedException, ProcessExitedException) as error:  # it failed, or was killed, for example for memory
        last = error.msg.strip().splitlines()[-1]
        said = f"process {seats.first + error.error_index} of {seats.processes}: {_KINDS.sub('', last)}"
        raise (LostRankError if any(word in last for word in _LOST) else ValueError)(said) from error
    finally:
        try:
            _pass_on(lines, say)
        finally:
            for process in workers.processes:
                process.kill()


def _pass_on(lines: Any, say: Callable[[str], None]) -> None:
    """Pass on the messages of the first process so far."""
    while True:
        try:
            say(lines.get_nowait())
        except queue.Empty:
            return


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return int(listening.getsockname()[1])


def _work(index: int, job: Job, seats: _Seats, lines: Any) -> None:
    """Run a job as one of its processes."""
    end_with_parent()
    rank, local = seats.first + index, seats.first_local + index
    threads = _threads(seats.local)
    own = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": seats.processes, "LOCAL_WORLD_SIZE": seats.local}
    place = {"MASTER_ADDR": seats.host, "MASTER_PORT": seats.port, "OMP_NUM_THREADS": threads}
    for name in _LAUNCHERS:
        os.environ.pop(name, None)
    os.environ |= {name: str(value) for name, value in (own | place).items()}
    torch.set_num_threads(threads)
    if job.device != "cpu" and local >= torch.cuda.device_count():
        raise ValueError(f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, none for its process {local}")
    _learn(job, "cpu" if job.device == "cpu" else f"cuda:{local}", lines.put)
    torch.distributed.barrier()  # no process leaves while another still listens
    torch.distributed.destroy_process_group()
    lines.close()
    lines.join_thread()  # every message is passed on
    # Leave at once: threads of torch 2.13 that outlive an orderly exit sometimes abort the process after its work is done.
    os._exit(0)


def _threads(processes: int) -> int:
    """Return the CPU threads of each of a machine's processes: an equal share of the cores, or less where the user says so."""
    share = max(1, len(os.sched_getaffinity(0)) // processes)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share


def _learn(job: Job, device: str, say: Callable[[str], None]) -> None:
    """Train in this process, alone or with others, and write the weights."""
    settings, student = job.settings, job.student
    if device != "cpu":
        torch.cuda.set_device(device)
    network = copy.deepcopy(student.network)
    student.weights.fill(network, dtype=torch.float32)
    data = job.data()
    torch.manual_seed(settings.seed)
    mapped = isinstance(settings.student, StaticStudent) and settings.student.map
    with trainable(network, settings.lora, integers=settings.integers, sharded=settings.sharded, mapped=mapped):
        hidden = _hidden(network, job, device) if settings.hidden else None
        train(network, data, settings, job.folder, hidden=hidden, cpu=device == "cpu", say=say)
    whole: dict[str, Any] = get_model_state_dict(network, options=WHOLE)
    if whole:  # only the first process has them
        write_tensors(job.folder / WEIGHTS, whole)


def _hidden(network: nn.Module, job: Job, device: str) -> HiddenStates:
    """Load the model that the student was pruned from, to run next to it."""
    whole = load_network(job.published, torch.float32).to(device)
    return HiddenStates(network, whole, followed(job.student.layers, len(blocks_of(whole)[1])), job.settings.hidden)
