"""The training loop: batches of texts to a student, its vectors held against the teacher's, checkpoints from which it goes on.

A plain loop over `accelerate`, which brings accumulation and several processes. The order of the texts follows from the seed alone,
so that a run that was killed goes on as if it had not been, and a batch is shared out among the processes and its vectors gathered
before they are compared, so that their number changes nothing but the time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from compress.common.files import write_text_atomic
from compress.methods.distill.hidden import HiddenStates
from compress.methods.distill.objectives import Objective
from compress.models.network.pooling import vectors_of
from compress.models.network.segments import blocks_of
from compress.models.text.spec import EmbedderSpec
from compress.models.text.tokens import Ids, TextTokenizer

# Batches are sorted by length within runs of so many, and then shuffled: little padding, and still any text beside any other.
SORTED_BATCHES = 32
LENGTH_STEP = 8
CURVE_FILE, STATE = "curve.jsonl", "state"
# Of parameters that lie divided among processes: put together in the first one's memory.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Objectives that compare a student's vector with the teacher's own.
VECTOR_OBJECTIVES = ("cosine", "mse")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    batch: int
    """Texts a step, of all processes together."""
    learning_rate: float
    warmup: float
    """Share of the steps in which the learning rate rises from 0; then it falls to 0 as a cosine."""
    weight_decay: float
    precision: str
    """`no` or `bf16`."""
    accumulate: int
    every: int
    """Steps between looks at the held-out texts, and between checkpoints."""
    patience: int | None
    """Looks without a better one after which it stops."""
    seed: int


class TokenTexts:
    """Texts as token ids, one behind the other, each with the number of its leading tokens that are not pooled."""

    def __init__(self, rows: Sequence[Ids], unpooled: Sequence[int]) -> None:
        self._flat = np.concatenate(rows).astype(np.int32)
        self.lengths = np.array([len(row) for row in rows])
        self._starts = np.concatenate([[0], np.cumsum(self.lengths)])
        self._unpooled = np.array(unpooled)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.lengths)

    def batch(self, chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return padded ids, their mask, and the mask of the tokens that are pooled: int64 [texts, length] each."""
        # In steps, because what multiplies keeps memory for every shape that it has seen.
        longest = min(-(-int(self.lengths[chosen].max()) // LENGTH_STEP) * LENGTH_STEP, int(self.lengths.max()))
        ids, mask = (np.zeros((len(chosen), longest), dtype=np.int64) for _ in range(2))
        for row, index in enumerate(chosen):
            length = self.lengths[index]
            ids[row, :length] = self._flat[self._starts[index] : self._starts[index] + length]
            mask[row, :length] = 1
        pooled = mask * (np.arange(longest)[None] >= self._unpooled[chosen][:, None])
        return tuple(torch.from_numpy(array) for array in (ids, mask, pooled))  # type: ignore[return-value]


def tokenized(
    tokenizer: TextTokenizer, texts: Sequence[str], prompts: Sequence[str], spec: EmbedderSpec, max_tokens: int
) -> TokenTexts:
    """Tokenize texts, each behind its own prompt, cut at `max_tokens`; where a prompt fills that, the last token is pooled."""
    lengths = {prompt: 0 if spec.pool_prompt or not prompt else tokenizer.prompt_length(prompt) for prompt in set(prompts)}
    rows = [row[:max_tokens] for row in tokenizer([prompt + text for prompt, text in zip(prompts, texts, strict=True)])]
    unpooled = [min(lengths[prompt], len(row) - 1) for prompt, row in zip(prompts, rows, strict=True)]
    return TokenTexts(rows, unpooled)


def read_curve(folder: Path) -> list[dict[str, float]]:
    """Return the curve of a training as far as its last checkpoint; empty before the first."""
    path = folder / CURVE_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def batch_order(lengths: np.ndarray, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Return the batches of an epoch: indices of texts; what does not fill a batch is left for another epoch."""
    generator = np.random.default_rng([seed, epoch])
    shuffled = generator.permutation(len(lengths))
    whole = len(lengths) // batch * batch
    batches: list[np.ndarray] = []
    for start in range(0, whole, batch * SORTED_BATCHES):
        run = shuffled[start : min(start + batch * SORTED_BATCHES, whole)]
        batches += np.split(run[np.argsort(lengths[run], kind="stable")], len(run) // batch)
    return [batches[index] for index in generator.permutation(len(batches))]


def batches_from(lengths: np.ndarray, schedule: Schedule, start: int) -> Iterator[np.ndarray]:
    """Yield the batches from number `start` on, epoch after epoch.

    Raises:
        ValueError: the texts do not fill a batch.
    """
    an_epoch = len(lengths) // schedule.batch
    if an_epoch == 0:
        raise ValueError(f"{len(lengths)} texts do not fill a batch of {schedule.batch}")
    number, epoch = start, -1
    while True:
        if number // an_epoch != epoch:
            epoch = number // an_epoch
            batches = batch_order(lengths, schedule.batch, schedule.seed, epoch)
        yield batches[number % an_epoch]
        number += 1


def with_neighbours(chosen: np.ndarray, neighbours: np.ndarray | None) -> np.ndarray:
    """Return the texts of a batch: as many of those chosen as leave room for their neighbours, and these, each once."""
    if neighbours is None:
        return chosen
    anchors = chosen[: max(1, len(chosen) // (1 + neighbours.shape[1]))]
    return np.unique(np.concatenate([anchors, neighbours[anchors].ravel()]))


def rate(schedule: Schedule, step: int) -> float:
    """Return the learning rate of a step as a share of the greatest."""
    rising = max(1, round(schedule.warmup * schedule.steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, schedule.steps - rising)))


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return what is trained, matrices with decay and all else without: norms, biases, tables."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.dim() > 1 and id(parameter) not in tables]
    other = [parameter for parameter in trained if parameter.dim() <= 1 or id(parameter) in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]


class _Run(nn.Module):
    """Student and map in one module, called as a whole, so that gradients are shared between processes whichever is used."""

    def __init__(self, network: nn.Module, map_: nn.Module | None, spec: EmbedderSpec) -> None:
        super().__init__()
        self.network, self.map, self._spec = network, map_, spec

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's vectors, and the same brought to the teacher's width."""
        vectors = vectors_of(self.network, ids, mask, pooled)
        return vectors, vectors if self.map is None else self.map(vectors)


def train(
    network: nn.Module,
    spec: EmbedderSpec,
    texts: TokenTexts,
    targets: Callable[[np.ndarray], np.ndarray],
    held_out: tuple[TokenTexts, np.ndarray],
    objectives: Mapping[str, tuple[float, Objective]],
    schedule: Schedule,
    folder: Path,
    *,
    neighbours: np.ndarray | None = None,
    hidden: HiddenStates | None = None,
    sharded: bool = False,
    cpu: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Train a network in place; in several processes, which torch's environment variables name, each calls this.

    Args:
        network: the student, float32; its parameters that require gradients are trained.
        spec: how its tokens become a vector.
        texts: what it learns from.
        targets: the teacher's vectors of texts, float32 [n, width], by their numbers.
        held_out: texts that it does not learn from, and the teacher's vectors of them.
        objectives: what is asked, each with its weight. Those that compare vector with vector see the student's, where it is of
            another width than the teacher's, through a linear map, which is trained and then thrown away.
        schedule: see there.
        folder: keeps checkpoints and the curve: step, loss, seconds and what `_judged` says, at each look. One that an earlier
            process left is gone on from.
        neighbours: texts that each is to be learned beside, int64 [texts, n].
        hidden: asks for hidden states besides.
        sharded: divide weights, gradients and the optimizer's state among the processes, block by block (FSDP: Zhao et al. 2023,
            arXiv 2304.11277), in torch's second version, which accelerate wraps for GPUs alone.
        cpu: stay there even where there is a GPU.
        say: told how it goes, by the first process.
    """
    from accelerate import Accelerator

    # Precision is left to torch: accelerate's is the process's, and would hold for the next training in it too.
    accelerator = Accelerator(gradient_accumulation_steps=schedule.accumulate, cpu=cpu)
    half = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=schedule.precision == "bf16")
    with torch.no_grad():
        own = int(vectors_of(network, *texts.batch(np.array([0]))).shape[1])
    torch.manual_seed(schedule.seed)
    width = held_out[1].shape[1]
    needed = own != width and any(name in VECTOR_OBJECTIVES for name in objectives)
    run: nn.Module = _Run(network, nn.Linear(own, width, bias=False) if needed else None, spec)
    if sharded:
        _shard(run.to(accelerator.device), network)
    optimizer = torch.optim.AdamW(
        parameter_groups(run, schedule.weight_decay), lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-6
    )
    if sharded:
        accelerated = accelerator.prepare(optimizer)
    else:
        run, accelerated = accelerator.prepare(run, optimizer)

    folder.mkdir(parents=True, exist_ok=True)
    state = _State(run, optimizer, folder, accelerator.is_main_process)
    curve = state.resumed()
    start = int(curve[-1]["step"]) if curve else 0
    began = time.perf_counter() - (curve[-1]["seconds"] if curve else 0.0)
    order = batches_from(texts.lengths, schedule, start * schedule.accumulate)
    share = _Share(accelerator.num_processes, accelerator.process_index)
    running: list[float] = []
    for step in range(start, schedule.steps):
        for group in accelerated.param_groups:
            group["lr"] = schedule.learning_rate * rate(schedule, step)
        for _ in range(schedule.accumulate):
            chosen = share.divisible(with_neighbours(next(order), neighbours))
            with accelerator.accumulate(run):
                batch = [tensor.to(accelerator.device) for tensor in texts.batch(share.own(chosen))]
                teacher = torch.from_numpy(targets(chosen)).to(accelerator.device)
                loss, asked = _losses(run, batch, teacher, objectives, hidden, share, half)
                accelerator.backward(asked)
                if accelerator.sync_gradients:
                    torch.nn.utils.clip_grad_norm_(run.parameters(), 1.0)
                accelerated.step()
                accelerated.zero_grad()
            running.append(float(loss.detach()))
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            kind, fidelity = _judged(run, accelerator.device, half, *held_out)
            seconds = time.perf_counter() - began
            curve.append({"step": step + 1, "loss": float(np.mean(running)), kind: fidelity, "seconds": seconds})
            running = []
            state.keep(curve)
            since = _looks_since_the_best([look[kind] for look in curve])
            enough = schedule.patience is not None and since >= schedule.patience
            if accelerator.is_main_process:
                place = f"step {step + 1:,} of {schedule.steps:,}"
                stopped = f"; no better for {since} looks, stopped" if enough else ""
                say(f"{place}: loss {curve[-1]['loss']:.4f}, held-out {kind} {fidelity:.4f}, {seconds:,.0f} s{stopped}")
            if enough:
                break


def _losses(
    run: nn.Module,
    batch: Sequence[torch.Tensor],
    teacher: torch.Tensor,
    objectives: Mapping[str, tuple[float, Objective]],
    hidden: HiddenStates | None,
    share: _Share,
    half: Callable[[], Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of a whole batch, of which this process has its share, and what gradients are to be taken of.

    Every process has the whole batch's loss and the gradient of its own texts' vectors, and gradients are averaged afterwards: so
    they are of the loss times the number of processes. Hidden states are each process's own.
    """
    with half(), hidden.watching() if hidden else nullcontext():
        vectors, mapped = (share.gathered(part.float()) for part in run(*batch))
    loss = torch.stack(
        [
            weight * objective(mapped if name in VECTOR_OBJECTIVES else vectors, teacher)
            for name, (weight, objective) in objectives.items()
        ]
    ).sum()
    if hidden is None:
        return loss, share.processes * loss
    with half():
        states = hidden.loss(*batch[:2])
    return loss + states, share.processes * loss + states


def _looks_since_the_best(fidelities: Sequence[float]) -> int:
    return len(fidelities) - 1 - fidelities.index(max(fidelities))


def _shard(run: nn.Module, network: nn.Module) -> None:
    """Divide the parameters of a run among the processes: each block's are put together while it runs."""
    from torch.distributed.fsdp import fully_shard

    for block in blocks_of(network)[1]:
        fully_shard(block)
    fully_shard(run)


@dataclass(frozen=True)
class _Share:
    """A process's share of each batch."""

    processes: int
    process: int

    def divisible(self, chosen: np.ndarray) -> np.ndarray:
        """Leave out of a batch what does not go round."""
        return chosen[: len(chosen) // self.processes * self.processes]

    def own(self, chosen: np.ndarray) -> np.ndarray:
        """Return this process's texts of a batch."""
        found: np.ndarray = np.split(chosen, self.processes)[self.process]
        return found

    def gathered(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return the vectors of a whole batch, of which gradients flow through this process's own alone."""
        if self.processes == 1:
            return vectors
        parts = [torch.empty_like(vectors) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, vectors.detach().contiguous())
        parts[self.process] = vectors
        return torch.cat(parts)


@torch.no_grad()
def _judged(
    run: nn.Module, device: torch.device, half: Callable[[], Any], texts: TokenTexts, teacher: np.ndarray
) -> tuple[str, float]:
    """Say how like the teacher's a student's vectors of texts are that it was not trained on.

    Returns:
        `cosine` and the mean cosine; where the two have different widths and nothing brings them together, `correlation` and
        Pearson's between the cosines of all pairs of texts.
    """
    order = np.argsort(texts.lengths, kind="stable")
    found = []
    for chosen in np.array_split(order, max(1, len(order) // 64)):
        with half():
            found.append(run(*(tensor.to(device) for tensor in texts.batch(chosen)))[1].float().cpu())
    ours, theirs = (nn.functional.normalize(vectors, dim=1) for vectors in (torch.cat(found), torch.from_numpy(teacher[order])))
    if ours.shape == theirs.shape:
        return "cosine", float((ours * theirs).sum(dim=1).mean())
    pairs = torch.stack([(vectors @ vectors.t())[~torch.eye(len(vectors), dtype=torch.bool)] for vectors in (ours, theirs)])
    return "correlation", float(torch.corrcoef(pairs)[0, 1])


class _State:
    """The checkpoints of a training: whole, however the parameters lie among the processes."""

    def __init__(self, run: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, main: bool) -> None:
        self._run, self._optimizer, self._folder, self._main = run, optimizer, folder, main

    def resumed(self) -> list[dict[str, float]]:
        """Go on from the last checkpoint, if there is one, and return the curve up to it."""
        curve = read_curve(self._folder)
        if not curve:
            return []
        kept = torch.load(self._path(int(curve[-1]["step"])), weights_only=True, map_location="cpu")
        set_state_dict(self._run, self._optimizer, model_state_dict=kept["run"], optim_state_dict=kept["optimizer"], options=WHOLE)
        return curve

    def keep(self, curve: Sequence[Mapping[str, float]]) -> None:
        """Write a checkpoint; the curve names it, and is written when it is whole. The one before goes then."""
        run, optimizer = get_state_dict(self._run, self._optimizer, options=WHOLE)
        if not self._main:
            return
        path = self._path(int(curve[-1]["step"]))
        torch.save({"run": run, "optimizer": optimizer}, path)
        write_text_atomic(self._folder / CURVE_FILE, "".join(json.dumps(look) + "\n" for look in curve))
        for other in self._folder.glob(f"{STATE}-*"):
            if other != path:
                other.unlink()

    def _path(self, step: int) -> Path:
        return self._folder / f"{STATE}-{step}.pt"
