"""The training loop: batches of texts to a student, its vectors held against the teacher's, checkpoints from which it goes on.

A plain loop over `accelerate`, which brings mixed precision, accumulation and several processes. The order of the texts follows
from the seed alone, so that a run that was killed goes on as if it had not been.
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

from compress.methods.distill.hidden import HiddenStates
from compress.methods.distill.objectives import Objective
from compress.models.checkpoint import write_text_atomic
from compress.models.forward import vectors_of
from compress.models.spec import EmbedderSpec
from compress.models.tokens import Ids, TextTokenizer

# Batches are sorted by length within runs of so many, and then shuffled: little padding, and still any text beside any other.
SORTED_BATCHES = 32
CURVE_FILE, STATE_FOLDER = "curve.jsonl", "state"


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    batch: int
    """Texts a step, of each process."""
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
        longest = int(self.lengths[chosen].max())
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


def batches_from(lengths: np.ndarray, schedule: Schedule, start: int, processes: int, process: int) -> Iterator[np.ndarray]:
    """Yield a process's batches from number `start` on, epoch after epoch.

    Raises:
        ValueError: the texts do not fill a batch of every process.
    """
    an_epoch = len(lengths) // schedule.batch // processes
    if an_epoch == 0:
        raise ValueError(f"{len(lengths)} texts do not fill a batch of {schedule.batch} for each of {processes} processes")
    number, epoch = start, -1
    while True:
        if number // an_epoch != epoch:
            epoch = number // an_epoch
            batches = batch_order(lengths, schedule.batch, schedule.seed, epoch)
        yield batches[(number % an_epoch) * processes + process]
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
        vectors = vectors_of(self.network, self._spec, ids, mask, pooled)
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
    vector_objectives: Sequence[str] = ("cosine", "mse"),
    cpu: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, float]]:
    """Train a network in place.

    Args:
        network: the student, float32; its parameters that require gradients are trained.
        spec: how its tokens become a vector.
        texts: what it learns from.
        targets: the teacher's vectors of texts, float32 [n, width], by their numbers.
        held_out: texts that it does not learn from, and the teacher's vectors of them.
        objectives: what is asked, each with its weight.
        schedule: see there.
        folder: keeps checkpoints and the curve; one that an earlier process left is gone on from.
        neighbours: texts that each is to be learned beside, int64 [texts, n].
        hidden: asks for hidden states besides.
        vector_objectives: which of them compare vector with vector; with another width than the teacher's they see the student's
            through a linear map, which is trained and then thrown away.
        cpu: stay there even where there is a GPU.
        say: told how it goes.

    Returns:
        The curve: step, loss, held-out cosine and seconds at each look.
    """
    from accelerate import Accelerator

    # Precision is left to torch: accelerate's is the process's, and would hold for the next training in it too.
    accelerator = Accelerator(gradient_accumulation_steps=schedule.accumulate, cpu=cpu)
    half = partial(torch.autocast, accelerator.device.type, torch.bfloat16, enabled=schedule.precision == "bf16")
    width = held_out[1].shape[1]
    with torch.no_grad():
        own = int(vectors_of(network, spec, *texts.batch(np.array([0]))).shape[1])
    torch.manual_seed(schedule.seed)
    map_ = nn.Linear(own, width, bias=False) if own != width else None
    run = _Run(network, map_, spec)
    optimizer = torch.optim.AdamW(
        parameter_groups(run, schedule.weight_decay), lr=schedule.learning_rate, betas=(0.9, 0.98), eps=1e-6
    )
    run, optimizer = accelerator.prepare(run, optimizer)

    folder.mkdir(parents=True, exist_ok=True)
    curve, start, best, since = _resumed(accelerator, folder)
    began = time.perf_counter()
    before = curve[-1]["seconds"] if curve else 0.0
    order = batches_from(texts.lengths, schedule, start * schedule.accumulate, accelerator.num_processes, accelerator.process_index)
    running: list[float] = []
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate(schedule, step)
        for _ in range(schedule.accumulate):
            chosen = with_neighbours(next(order), neighbours)
            with accelerator.accumulate(run):
                batch = [tensor.to(accelerator.device) for tensor in texts.batch(chosen)]
                with half(), hidden.watching() if hidden else nullcontext():
                    vectors, mapped = run(*batch)
                teacher = torch.from_numpy(targets(chosen)).to(accelerator.device)
                losses = [
                    weight * objective((mapped if name in vector_objectives else vectors).float(), teacher)
                    for name, (weight, objective) in objectives.items()
                ]
                if hidden is not None:
                    with half():
                        losses.append(hidden.loss(*batch[:2]))
                loss = torch.stack(losses).sum()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(run.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            running.append(float(loss.detach()))
        if (step + 1) % schedule.every == 0 or step + 1 == schedule.steps:
            cosine = _held_out_cosine(run, accelerator.device, half, *held_out)
            seconds = before + time.perf_counter() - began
            curve.append({"step": step + 1, "loss": float(np.mean(running)), "cosine": cosine, "seconds": seconds})
            running = []
            since = 0 if cosine > best else since + 1
            best = max(best, cosine)
            _keep(accelerator, folder, curve)
            place = f"step {step + 1:,} of {schedule.steps:,}"
            say(f"{place}: loss {curve[-1]['loss']:.4f}, held-out cosine {cosine:.4f}, {seconds:,.0f} s")
            if schedule.patience is not None and since >= schedule.patience:
                say(f"no better for {since} looks; stopped")
                break
    return curve


@torch.no_grad()
def _held_out_cosine(
    run: nn.Module, device: torch.device, half: Callable[[], Any], texts: TokenTexts, vectors: np.ndarray
) -> float:
    """Return the mean cosine to the teacher's vectors of texts that were not trained on."""
    order = np.argsort(texts.lengths, kind="stable")
    found = []
    for chosen in np.array_split(order, max(1, len(order) // 64)):
        with half():
            _, mapped = run(*(tensor.to(device) for tensor in texts.batch(chosen)))
        teacher = torch.from_numpy(vectors[chosen]).to(device)
        found.append(torch.cosine_similarity(mapped.float(), teacher, dim=1))
    return float(torch.cat(found).mean())


def _resumed(accelerator: Any, folder: Path) -> tuple[list[dict[str, float]], int, float, int]:
    """Read the last checkpoint, if any: the curve up to it, the step, the best cosine and how many looks ago it was."""
    path = folder / CURVE_FILE
    if not path.exists():
        return [], 0, -1.0, 0
    curve = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    step = int(curve[-1]["step"])
    accelerator.load_state(str(folder / f"{STATE_FOLDER}-{step}"))
    cosines = [look["cosine"] for look in curve]
    best = max(cosines)
    return curve, step, best, len(cosines) - 1 - cosines.index(best)


def _keep(accelerator: Any, folder: Path, curve: Sequence[Mapping[str, float]]) -> None:
    """Write a checkpoint; the curve names it, and is written when it is whole. The one before goes then."""
    import shutil

    step = int(curve[-1]["step"])
    accelerator.save_state(str(folder / f"{STATE_FOLDER}-{step}"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_text_atomic(folder / CURVE_FILE, "".join(json.dumps(look) + "\n" for look in curve))
        for other in folder.glob(f"{STATE_FOLDER}-*"):
            if other.name != f"{STATE_FOLDER}-{step}":
                shutil.rmtree(other)
