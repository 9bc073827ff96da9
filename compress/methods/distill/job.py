"""A training as one object that can be sent to processes, and the processes that run it."""

from __future__ import annotations

import copy
import os
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from compress.common.children import end_with_parent
from compress.methods.distill.batches import TokenTexts
from compress.methods.distill.checkpoints import WHOLE, read_curve
from compress.methods.distill.hidden import HiddenStates, followed
from compress.methods.distill.settings import DistillSettings
from compress.methods.distill.trainable import trainable
from compress.methods.distill.training import TrainingData, train
from compress.models.files.shards import write_tensors
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of
from compress.models.opened import OpenModel

WEIGHTS = "student.safetensors"
WAIT_SECONDS = 0.5


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


def learn(job: Job, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Run a job in as many processes as it asks for, and return the curve.

    Raises:
        ValueError: the student or the texts do not allow it, or a process failed.
    """
    if job.processes == 1:
        _learn(job, job.device, say)
        return read_curve(job.folder)
    lines: Any = get_context("spawn").Queue()
    workers = spawn(_work, args=(job, _free_port(), lines), nprocs=job.processes, join=False)  # type: ignore[no-untyped-call]
    try:
        while not workers.join(timeout=WAIT_SECONDS):
            _pass_on(lines, say)
    except (ProcessRaisedException, ProcessExitedException) as error:  # it failed, or was killed, for example for memory
        last = error.msg.strip().splitlines()[-1]
        raise ValueError(f"process {error.error_index} of {job.processes}: {last.removeprefix('ValueError: ')}") from error
    finally:
        _pass_on(lines, say)
        for process in workers.processes:
            process.kill()
    return read_curve(job.folder)


def _pass_on(lines: Any, say: Callable[[str], None]) -> None:
    """Pass on the messages of the first process so far."""
    while True:
        try:
            say(lines.get_nowait())
        except queue.Empty:
            return


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _work(rank: int, job: Job, port: int, lines: Any) -> None:
    """Run a job as one of its processes."""
    end_with_parent()
    threads = max(1, len(os.sched_getaffinity(0)) // job.processes)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    os.environ |= {name: str(value) for name, value in (own | place).items()}
    torch.set_num_threads(threads)
    _learn(job, "cpu" if job.device == "cpu" else f"cuda:{rank}", lines.put)
    torch.distributed.barrier()  # no process leaves while another still listens
    torch.distributed.destroy_process_group()
    lines.close()
    lines.join_thread()  # every message is passed on
    # Leave at once: threads of torch 2.13 that outlive an orderly exit sometimes abort the process after its work is done.
    os._exit(0)


def _learn(job: Job, device: str, say: Callable[[str], None]) -> None:
    """Train in this process, alone or with others, and write the weights."""
    settings, student = job.settings, job.student
    if device != "cpu":
        torch.cuda.set_device(device)
    network = copy.deepcopy(student.network)
    student.weights.fill(network, dtype=torch.float32)
    data = job.data()
    torch.manual_seed(settings.seed)
    with trainable(network, settings.lora, integers=settings.integers, sharded=settings.sharded):
        hidden = _hidden(network, job, device) if settings.hidden else None
        train(network, data, settings, job.folder, hidden=hidden, cpu=device == "cpu", say=say)
    whole: dict[str, Any] = get_model_state_dict(network, options=WHOLE)
    if whole:  # only the first process has them
        write_tensors(job.folder / WEIGHTS, whole)


def _hidden(network: nn.Module, job: Job, device: str) -> HiddenStates:
    """Load the model that the student was pruned from, to run next to it."""
    whole = load_network(job.published, torch.float32).to(device)
    return HiddenStates(network, whole, followed(job.student.layers, len(blocks_of(whole)[1])), job.settings.hidden)
