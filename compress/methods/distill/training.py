"""The training loop: a student's vectors are compared with the teacher's, batch by batch, with checkpoints to resume from.

A plain loop over `accelerate`, which adds gradient accumulation and several processes. The order of the texts follows only from the
seed, so a training that was killed goes on as if it had not been. A batch is split among the processes and its vectors are
gathered before they are compared, so the number of processes changes only the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.methods.distill.batches import TokenTexts, batches_from, with_neighbours
from compress.methods.distill.checkpoints import Checkpoints
from compress.methods.distill.hidden import HiddenStates
from compress.methods.distill.objectives import VECTOR_OBJECTIVES, objectives_of
from compress.methods.distill.settings import DistillSettings
from compress.models.network.pooling import vectors_of
from compress.models.network.segments import blocks_of


@dataclass(frozen=True)
class TrainingData:
    """What a student learns from, and what it is judged by."""

    texts: TokenTexts
    targets: np.ndarray
    """The teacher's vectors of `texts`, float32 [texts, width]; may be mapped from a file."""
    held_out: TokenTexts
    """Texts that are not trained on."""
    held_out_targets: np.ndarray
    """The teacher's vectors of `held_out`, float32 [texts, width]."""
    neighbours: np.ndarray | None = None
    """Texts that belong in the same batch as each text, int64 [texts, n]; None: none."""


def train(
    network: nn.Module,
    data: TrainingData,
    settings: DistillSettings,
    folder: Path,
    *,
    hidden: HiddenStates | None = None,
    cpu: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Train a network in place. With several processes, which torch's environment variables name, each of them calls this.

    Args:
        network: the student, float32; its parameters that require gradients are trained.
        data: what it learns from. Objectives that compare vector with vector see a student of another width than the teacher
            through a linear map, which is trained with it and then thrown away.
        settings: objectives, number of steps, learning rate and so on.
        folder: where checkpoints and the curve are kept. The curve has step, loss, seconds and the result of `_Trainer.judge` for
            each evaluation. A training found there is resumed.
        hidden: the hidden-state loss, if it is wanted.
        cpu: whether to stay on the CPU even if there is a GPU.
        say: called with progress messages by the first process.

    Raises:
        ValueError: the texts do not fill a batch.
    """
    trainer = _Trainer(network, data, settings, hidden, cpu)
    checkpoints = Checkpoints(trainer.run, trainer.optimizer, folder, trainer.is_main, trainer.processes)
    curve = checkpoints.resume(say if trainer.is_main else lambda _: None)
    start = int(curve[-1]["step"]) if curve else 0
    began = time.perf_counter() - (curve[-1]["seconds"] if curve else 0.0)
    batches = batches_from(data.texts.lengths, settings, start * settings.accumulate)
    losses: list[float] = []
    if _stops(curve, settings):  # it was killed after it had stopped early
        return
    for step in range(start, settings.steps):
        trainer.set_rate(rate(settings, step))
        losses += [trainer.learn(with_neighbours(next(batches), data.neighbours)) for _ in range(settings.accumulate)]
        if (step + 1) % settings.every and step + 1 < settings.steps:
            continue
        kind, fidelity = trainer.judge()
        seconds = time.perf_counter() - began
        curve.append({"step": step + 1, "loss": float(np.mean(losses)), kind: fidelity, "seconds": seconds})
        losses = []
        checkpoints.keep(curve)
        stops = _stops(curve, settings)
        if trainer.is_main:
            place = f"step {step + 1:,} of {settings.steps:,}"
            ending = f"; no improvement in {settings.patience} evaluations, stopped" if stops else ""
            say(f"{place}: loss {curve[-1]['loss']:.4f}, held-out {kind} {fidelity:.4f}, {seconds:,.0f} s{ending}")
        if stops:
            break


def rate(settings: DistillSettings, step: int) -> float:
    """Return the learning rate of a step as a share of the peak: a linear rise, then half a cosine (arXiv 1608.03983)."""
    rising = max(1, round(settings.warmup * settings.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, settings.steps - rising)))


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trained parameters in two groups: matrices, with decay; norms, biases and embedding tables, without."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in tables]
    other = [parameter for parameter in trained if parameter.dim() <= 1 or id(parameter) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]


class _Run(nn.Module):
    """Student and map as one module: gradients are then shared between processes for both, whichever is used."""

    def __init__(self, network: nn.Module, map_: nn.Module | None) -> None:
        super().__init__()
        self.network, self.map = network, map_

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's vectors, and the same mapped to the teacher's width."""
        vectors = vectors_of(self.network, ids, mask, pooled)
        return vectors, vectors if self.map is None else self.map(vectors)


class _Trainer:
    """One process's part of a training: the student, its optimizer, and one step at a time."""

    def __init__(
        self,
        network: nn.Module,
        data: TrainingData,
        settings: DistillSettings,
        hidden: HiddenStates | None,
        cpu: bool,
    ) -> None:
        from accelerate import Accelerator

        # Precision is left to torch: accelerate's is set per process, and would hold for the next training in it too.
        self._accelerator = Accelerator(gradient_accumulation_steps=settings.accumulate, cpu=cpu)
        self._device = self._accelerator.device
        self._half = partial(torch.autocast, self._device.type, torch.bfloat16, enabled=settings.precision == "bf16")
        self._data, self._settings, self._hidden = data, settings, hidden
        self._objectives = objectives_of(settings.objectives, settings.matryoshka)
        self._share = _Share(self._accelerator.num_processes, self._accelerator.process_index)
        self.run: nn.Module = _with_map(network, data, settings)
        if settings.sharded:
            _shard(self.run.to(self._device), network)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.run, settings.weight_decay), lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-6
        )
        if settings.sharded:
            self._accelerated = self._accelerator.prepare(self.optimizer)
        else:
            self.run, self._accelerated = self._accelerator.prepare(self.run, self.optimizer)

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return bool(self._accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """Number of processes."""
        return self._share.processes

    def set_rate(self, share: float) -> None:
        """Set the learning rate to a share of the peak."""
        for group in self._accelerated.param_groups:
            group["lr"] = self._settings.learning_rate * share

    def learn(self, texts: np.ndarray) -> float:
        """Train on a batch, given as indices of texts, and return its loss. The weights change with the last batch of a step."""
        chosen = self._share.divisible(texts)
        with self._accelerator.accumulate(self.run):
            batch = [tensor.to(self._device) for tensor in self._data.texts.batch(self._share.own(chosen))]
            teacher = torch.from_numpy(self._data.targets[chosen]).to(self._device)
            loss, differentiated = self._losses(batch, teacher)
            self._accelerator.backward(differentiated)
            if self._accelerator.sync_gradients:
                torch.nn.utils.clip_grad_norm_(self.run.parameters(), 1.0)
            self._accelerated.step()
            self._accelerated.zero_grad()
        return float(loss.detach())

    def _losses(self, batch: Sequence[torch.Tensor], teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the whole batch, and the loss to differentiate for this process's share of it.

        Every process has the whole batch's loss but only the gradient of its own texts' vectors, and gradients are averaged over
        the processes afterwards. So the loss to differentiate is multiplied by their number. The hidden-state loss is each
        process's own.
        """
        with self._half(), self._hidden.watching() if self._hidden else nullcontext():
            vectors, mapped = (self._share.gathered(part.float()) for part in self.run(*batch))
        terms = [
            weight * objective(mapped if name in VECTOR_OBJECTIVES else vectors, teacher)
            for name, (weight, objective) in self._objectives.items()
        ]
        loss = torch.stack(terms).sum()
        if self._hidden is None:
            return loss, self._share.processes * loss
        with self._half():
            states = self._hidden.loss(*batch[:2])
        return loss + states, self._share.processes * loss + states

    @torch.no_grad()
    def judge(self) -> tuple[str, float]:
        """Compare the student's vectors of the held-out texts with the teacher's.

        Returns:
            `cosine` and the mean cosine. If the two have different widths and there is no map, `correlation` and Pearson's
            correlation between the cosines of all pairs of texts. Every process gets the number of the first one: machines of two
            kinds may round differently, and all have to stop at the same step.
        """
        texts, targets = self._data.held_out, self._data.held_out_targets
        order = np.argsort(texts.lengths, kind="stable")
        found = []
        for chosen in np.array_split(order, max(1, len(order) // 64)):
            with self._half():
                found.append(self.run(*(tensor.to(self._device) for tensor in texts.batch(chosen)))[1].float().cpu())
        ours, theirs = (nn.functional.normalize(vectors, dim=1) for vectors in (torch.cat(found), torch.from_numpy(targets[order])))
        if ours.shape == theirs.shape:
            return "cosine", self._share.first(float((ours * theirs).sum(dim=1).mean()), self._device)
        pairs = torch.stack([(vectors @ vectors.t())[~torch.eye(len(vectors), dtype=torch.bool)] for vectors in (ours, theirs)])
        return "correlation", self._share.first(float(torch.corrcoef(pairs)[0, 1]), self._device)


def _with_map(network: nn.Module, data: TrainingData, settings: DistillSettings) -> _Run:
    """Return the student with a linear map to the teacher's width, if an objective needs one."""
    with torch.no_grad():
        own = int(vectors_of(network, *data.texts.batch(np.array([0]))).shape[1])
    torch.manual_seed(settings.seed)
    width = data.held_out_targets.shape[1]
    needed = own != width and any(name in VECTOR_OBJECTIVES for name in settings.objectives)
    return _Run(network, nn.Linear(own, width, bias=False) if needed else None)


def _shard(run: nn.Module, network: nn.Module) -> None:
    """Split a run's parameters among the processes; a block's are put together only while it runs.

    FSDP (Zhao et al. 2023, arXiv 2304.11277) in torch's second version, which accelerate supports only on GPUs.
    """
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(network)[1]:
        fully_shard(block)
    fully_shard(run)


def _stops(curve: Sequence[Mapping[str, float]], settings: DistillSettings) -> bool:
    """Whether a training with this curve stops early: `patience` evaluations have brought no improvement."""
    if settings.patience is None or not curve:
        return False
    kind = next(name for name in curve[-1] if name not in ("step", "loss", "seconds"))
    fidelities = [look[kind] for look in curve]
    return len(fidelities) - 1 - fidelities.index(max(fidelities)) >= settings.patience


@dataclass(frozen=True)
class _Share:
    """A process's share of each batch."""

    processes: int
    process: int

    def divisible(self, chosen: np.ndarray) -> np.ndarray:
        """Leave out the texts at the end of a batch that cannot be shared out evenly."""
        return chosen[: len(chosen) // self.processes * self.processes]

    def own(self, chosen: np.ndarray) -> np.ndarray:
        """Return this process's texts of a batch."""
        found: np.ndarray = np.split(chosen, self.processes)[self.process]
        return found

    def gathered(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the vectors of the whole batch; gradients flow only through this process's own."""
        if self.processes == 1:
            return vectors
        parts = [torch.empty_like(vectors) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, vectors.detach().contiguous())
        parts[self.process] = vectors
        return torch.cat(parts)

    def first(self, number: float, device: torch.device) -> float:
        """Return the number of the first process."""
        if self.processes == 1:
            return number
        sent = torch.tensor(number, dtype=torch.float64, device=device)
        torch.distributed.broadcast(sent, src=0)
        return float(sent)
