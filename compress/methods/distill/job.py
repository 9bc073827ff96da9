"""A training as a parcel: everything that a process needs to take part in it, and the processes that do."""

from __future__ import annotations

import copy
import os
import queue
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from compress.methods.distill.hidden import HiddenStates, followed
from compress.methods.distill.objectives import OBJECTIVES, matryoshka
from compress.methods.distill.trainable import trainable
from compress.methods.distill.training import WHOLE, Schedule, TokenTexts, read_curve, train
from compress.models.files.shards import write_tensors
from compress.models.folder import ModelFolder
from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of
from compress.models.opened import OpenModel

if TYPE_CHECKING:
    from compress.methods.distill.method import Distill

WEIGHTS = "student.safetensors"
WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """What is to be learned, by whom, from what."""

    step: Distill
    student: OpenModel
    published: ModelFolder
    """Folder of the model that the student is what is left of, for hidden states."""
    texts: TokenTexts
    targets: Path
    """The teacher's vectors of the texts, float32 [texts, width], as numpy writes them; mapped, not read."""
    held_out: tuple[TokenTexts, np.ndarray]
    neighbours: np.ndarray | None
    folder: Path
    """Keeps checkpoints, and in the end the weights, under `WEIGHTS`."""
    device: str

    @property
    def processes(self) -> int:
        """How many processes take part: as the step says, or one for each GPU."""
        return self.step.processes or (torch.cuda.device_count() if self.device == "cuda" else 1)


def learn(job: Job, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Do a job, in as many processes as it wants, and return the curve.

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
    except (ProcessRaisedException, ProcessExitedException) as error:  # it failed, or was killed, say for memory
        last = error.msg.strip().splitlines()[-1]
        raise ValueError(f"process {error.error_index} of {job.processes}: {last.removeprefix('ValueError: ')}") from error
    finally:
        _pass_on(lines, say)
        for process in workers.processes:
            process.kill()
    return read_curve(job.folder)


def _pass_on(lines: Any, say: Callable[[str], None]) -> None:
    """Say what the first process said so far."""
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
    """Take part in a job, as one of its processes."""
    threads = max(1, len(os.sched_getaffinity(0)) // job.processes)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": threads}
    os.environ |= {name: str(value) for name, value in (own | place).items()}
    torch.set_num_threads(threads)
    _learn(job, "cpu" if job.device == "cpu" else f"cuda:{rank}", lines.put)
    torch.distributed.barrier()  # nobody leaves while another still listens
    torch.distributed.destroy_process_group()
    lines.close()
    lines.join_thread()  # what was said is passed on
    # At once: threads of torch 2.13 that live on into an orderly end abort the process now and then, its work done.
    os._exit(0)


def _learn(job: Job, device: str, say: Callable[[str], None]) -> None:
    """Train in this process, alone or beside others, and write the weights."""
    step, student = job.step, job.student
    if device != "cpu":
        torch.cuda.set_device(device)
    network = copy.deepcopy(student.network)
    student.weights.fill(network, dtype=torch.float32)
    asked = {name: (weight, OBJECTIVES[name]) for name, weight in step.objectives.items()}
    if step.matryoshka:
        asked = {name: (weight, matryoshka(function, step.matryoshka)) for name, (weight, function) in asked.items()}
    targets = np.load(job.targets, mmap_mode="r")

    def of(chosen: np.ndarray) -> np.ndarray:
        found: np.ndarray = targets[chosen]
        return found

    torch.manual_seed(step.seed)
    with trainable(network, step.lora, integers=step.integers, sharded=step.sharded):
        train(
            network,
            student.spec,
            job.texts,
            of,
            job.held_out,
            asked,
            Schedule(**{name: getattr(step, name) for name in Schedule.__dataclass_fields__}),
            job.folder,
            neighbours=job.neighbours,
            hidden=_hidden(network, job, device) if step.hidden else None,
            sharded=step.sharded,
            cpu=device == "cpu",
            say=say,
        )
    whole: dict[str, Any] = get_model_state_dict(network, options=WHOLE)
    if whole:  # the first process has it
        write_tensors(job.folder / WEIGHTS, whole)


def _hidden(network: nn.Module, job: Job, device: str) -> HiddenStates:
    """Load the model that the student is what is left of, to run beside it."""
    whole = load_network(job.published, torch.float32).to(device)
    return HiddenStates(network, whole, followed(job.student.layers, len(blocks_of(whole)[1])), job.step.hidden)
