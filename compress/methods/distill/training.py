"""The training loop: a student's vectors are compared with the teacher's, batch by batch, with checkpoints to resume from.

A plain loop over `accelerate`, which adds gradient accumulation and several processes. The order of the texts follows only from the
seed, so a training that was killed goes on as if it had not been. A batch is split among the processes and its vectors are
gathered before they are compared, so the number of processes changes only the time.

With `depth: any`, each batch is compared after the last block and after a few others drawn for it. That is slimmable networks (Yu
et al. 2019, arXiv 1812.08928) along the depth, with the sandwich rule's largest network in every step and random smaller ones (Yu
and Huang 2019, arXiv 1903.05134, section 3.2). Its smallest one is drawn like the others: few would use it. All exits come of one
run of the network, and one backward pass carries their gradients together.
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

from compress.methods.distill.batches import TokenTexts, batches_from, drawn_depths, with_neighbours
from compress.methods.distill.checkpoints import Checkpoints
from compress.methods.distill.hidden import HiddenStates
from compress.methods.distill.objectives import VECTOR_OBJECTIVES, objectives_of
from compress.methods.distill.settings import DistillSettings
from compress.models.network.exits import Exits
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
    batches = batches_from(data.texts.lengths, settings, settings.first_batch + start * settings.accumulate)
    losses: list[float] = []
    if _stops(curve, settings):  # it was killed after it had stopped early
        return
    for step in range(start, settings.steps):
        trainer.set_rate(rate(settings, step))
        numbers = range(step * settings.accumulate, (step + 1) * settings.accumulate)
        losses += [trainer.learn(with_neighbours(next(batches), data.neighbours), number) for number in numbers]
        if (step + 1) % settings.every and step + 1 < settings.steps:
            continue
        fidelities = trainer.judge()
        seconds = time.perf_counter() - began
        curve.append({"step": step + 1, "loss": float(np.mean(losses)), **fidelities, "seconds": seconds})
        losses = []
        checkpoints.keep(curve)
        stops = _stops(curve, settings)
        if trainer.is_main:
            place = f"step {step + 1:,} of {settings.steps:,}"
            ending = f"; no improvement in {settings.patience} evaluations, stopped" if stops else ""
            shown = ", ".join(f"{name} {fidelity:.4f}" for name, fidelity in fidelities.items())
            say(f"{place}: loss {curve[-1]['loss']:.4f}, held-out {shown}, {seconds:,.0f} s{ending}")
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

    def __init__(self, network: nn.Module, map_: nn.Module | None, exits: Exits | None) -> None:
        super().__init__()
        self.network, self.map, self.exits = network, map_, exits

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor, depths: Sequence[int] = ()
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the student's vectors at each of some shallower depths and last at its whole one, and the same mapped to the
        teacher's width."""
        if self.exits is None:
            found = [vectors_of(self.network, ids, mask, pooled)]
        else:
            found = self.exits.vectors(ids, mask, pooled, depths)
        return [(vectors, vectors if self.map is None else self.map(vectors)) for vectors in found]


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
        run = _with_map(network, data, settings)
        self._shallower = run.exits.shallower if run.exits is not None else ()
        self.run: nn.Module = run
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

    def learn(self, texts: np.ndarray, number: int) -> float:
        """Train on a batch and return its loss. The weights change with the last batch of a step.

        Args:
            texts: indices of its texts.
            number: its number among all batches, from 0.
        """
        chosen = self._share.divisible(texts)
        with self._accelerator.accumulate(self.run):
            batch = [tensor.to(self._device) for tensor in self._data.texts.batch(self._share.own(chosen))]
            teacher = torch.from_numpy(self._data.targets[chosen]).to(self._device)
            depths = drawn_depths(self._shallower, self._settings.exits, self._settings.seed, number) if self._shallower else ()
            loss, differentiated = self._losses(batch, teacher, depths)
            self._accelerator.backward(differentiated)
            if self._accelerator.sync_gradients:
                torch.nn.utils.clip_grad_norm_(self.run.parameters(), 1.0)
            self._accelerated.step()
            self._accelerated.zero_grad()
        return float(loss.detach())

    def _losses(
        self, batch: Sequence[torch.Tensor], teacher: torch.Tensor, depths: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of the whole batch, and the loss to differentiate for this process's share of it.

        The loss is the mean over the whole depth and `depths`, each of which is compared with the same vectors of the teacher.

        Every process has the whole batch's loss but only the gradient of its own texts' vectors, and gradients are averaged over
        the processes afterwards. So the loss to differentiate is multiplied by their number. The hidden-state loss is each
        process's own.
        """
        with self._half(), self._hidden.watching() if self._hidden else nullcontext():
            found = [tuple(self._share.gathered(part.float()) for part in pair) for pair in self.run(*batch, depths)]
        terms = [
            weight * objective(mapped if name in VECTOR_OBJECTIVES else vectors, teacher)
            for vectors, mapped in found
            for name, (weight, objective) in self._objectives.items()
        ]
        loss = torch.stack(terms).view(len(found), -1).sum(dim=1).mean()
        if self._hidden is None:
            return loss, self._share.processes * loss
        with self._half():
            states = self._hidden.loss(*batch[:2])
        return loss + states, self._share.processes * loss + states

    @torch.no_grad()
    def judge(self) -> dict[str, float]:
        """Compare the student's vectors of the held-out texts with the teacher's.

        Returns:
            `cosine` and the mean cosine. If the two have different widths and there is no map, `correlation` and Pearson's
            correlation between the cosines of all pairs of texts. With exits also the same at each shallower depth, as `cosine_1`
            and so on. Every process gets the numbers of the first one: machines of two kinds may round differently, and all have to
            stop at the same step.
        """
        texts, targets = self._data.held_out, self._data.held_out_targets
        order = np.argsort(texts.lengths, kind="stable")
        found: list[list[torch.Tensor]] = [[] for _ in (*self._shallower, "whole")]
        for chosen in np.array_split(order, max(1, len(order) // 64)):
            with self._half():
                pairs = self.run(*(tensor.to(self._device) for tensor in texts.batch(chosen)), self._shallower)
            for made, (_, mapped) in zip(found, pairs, strict=True):
                made.append(mapped.float().cpu())
        theirs = torch.from_numpy(targets[order])
        *exits, (kind, whole) = (_fidelity(torch.cat(made), theirs) for made in found)
        fidelities = {kind: whole} | {f"{kind}_{depth}": at for depth, (_, at) in zip(self._shallower, exits, strict=True)}
        return {name: self._share.first(fidelity, self._device) for name, fidelity in fidelities.items()}


def _fidelity(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[str, float]:
    """Return how a student's vectors are compared with the teacher's, float32 [texts, width] each, and with what result."""
    ours, theirs = (nn.functional.normalize(vectors, dim=1) for vectors in (ours, theirs))
    if ours.shape == theirs.shape:
        return "cosine", float((ours * theirs).sum(dim=1).mean())
    pairs = torch.stack([(vectors @ vectors.t())[~torch.eye(len(vectors), dtype=torch.bool)] for vectors in (ours, theirs)])
    return "correlation", float(torch.corrcoef(pairs)[0, 1])


def _with_map(network: nn.Module, data: TrainingData, settings: DistillSettings) -> _Run:
    """Return the student with its exits, if it is to have any depth, and a linear map to the teacher's width, if needed."""
    first = data.texts.batch(np.array([0]))
    exits = Exits(network, *first[:2]) if settings.depth else None
    with torch.no_grad():
        own = int(vectors_of(network, *first).shape[1])
    torch.manual_seed(settings.seed)
    width = data.held_out_targets.shape[1]
    needed = own != width and any(name in VECTOR_OBJECTIVES for name in settings.objectives)
    return _Run(network, nn.Linear(own, width, bias=False) if needed else None, exits)


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
    names = [name for name in curve[-1] if name not in ("step", "loss", "seconds")]  # several with exits: their mean counts
    fidelities = [sum(look[name] for name in names) / len(names) for look in curve]
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
