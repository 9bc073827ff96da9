"""Trains the network that embeds queries towards the vectors of the model that embedded the documents; those stay as they are.

The loop and the losses are those of `compress.methods.distill`. Queries alone are enough: whatever the documents are, their vectors
lie where the other model puts them (KALE: Campos et al. 2023, arXiv 2304.01016; LEAF: Vujanic and Rueckstiess 2025,
arXiv 2509.12539).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from compress.common.files import save_array
from compress.common.journal import Journal
from compress.layers.float_layers import has_onednn_linear
from compress.methods import method_class
from compress.methods.align.settings import AlignSettings
from compress.methods.base import Bench
from compress.methods.distill.batches import TokenTexts, tokenized
from compress.methods.distill.job import Job, learn
from compress.methods.distill.settings import DistillSettings
from compress.models.embedder import Vectors
from compress.models.opened import OpenModel

TARGETS = "targets.npy"
BATCH, MAX_TOKENS, LOOKS = 64, 128, 5
# Steps that are timed, after as many that are not: torch prepares its kernels in the first ones.
PACE_STEPS = 8
PACE_TEXTS = 16


class Queries:
    """A training of the network that embeds queries."""

    def __init__(self, settings: AlignSettings, student: OpenModel, bench: Bench, device: str) -> None:
        """Take the model to train, which has the fitted map as its last module.

        Args:
            settings: the step.
            student: the model.
            bench: says how far it is, and keeps the files.
            device: where it is trained.
        """
        self.settings, self.student, self.bench, self.device = settings, student, bench, device

    def learn(self, texts: tuple[Sequence[str], Sequence[str]], targets: Sequence[Vectors]) -> list[dict[str, float]]:
        """Train for the minutes that the step says, write the weights, and return the curve.

        Args:
            texts: those to train on, and the held-out ones.
            targets: the other model's vectors of both, float32 [texts, width] each.

        Raises:
            ValueError: there are fewer texts than a batch takes, or the model's numbers cannot be trained around.
        """
        if len(texts[0]) < BATCH:
            raise ValueError(f"{self.settings.texts}: {len(texts[0]):,} texts to train on are less than a batch of {BATCH}")
        prompt = self.student.spec.prompt(task=self.settings.task)
        taught, held_out = (
            tokenized(self.student.tokenizer, part, [prompt] * len(part), self.student.spec, MAX_TOKENS) for part in texts
        )
        self.bench.folder.mkdir(parents=True, exist_ok=True)
        save_array(self.bench.folder / TARGETS, targets[0])
        job = Job(
            settings=self._settings(PACE_STEPS),
            student=self.student,
            published=self.bench.published,
            texts=taught,
            targets=self.bench.folder / TARGETS,
            held_out=held_out,
            held_out_targets=targets[1],
            neighbours=None,
            folder=self.bench.folder,
            device=self.device,
        )
        # Kept, so that a training that was killed goes on with the steps that it began with.
        steps = int(Journal(self.bench.folder).once("pace", lambda: {"steps": self._steps(job, texts[1])})["steps"])
        self.bench.say(f"training on {len(taught):,} texts: {steps:,} steps of {BATCH} in about {self.settings.minutes:g} min")
        return learn(replace(job, settings=self._settings(steps)), self.bench.say)

    def _settings(self, steps: int) -> DistillSettings:
        fast = self.device != "cpu" or has_onednn_linear(torch.bfloat16)
        keys = {
            "method": "distill",
            "texts": self.settings.texts,
            "steps": steps,
            "batch": BATCH,
            "max_tokens": MAX_TOKENS,
            "every": max(1, -(-steps // LOOKS)),
            "precision": "bf16" if fast else "no",
            "processes": 1,
            "seed": self.settings.seed,
        }
        made = method_class("distill").model_validate(keys)
        assert isinstance(made, DistillSettings)
        return made

    def _steps(self, job: Job, held_out: Sequence[str]) -> int:
        """Return how many steps fill the minutes, by the pace of the first few; what these learn is thrown away."""
        few = np.arange(min(PACE_TEXTS, len(held_out)))
        settings = self._settings(2 * PACE_STEPS).model_copy(update={"every": PACE_STEPS})
        looked = replace(
            job,
            settings=settings,
            held_out=_part(job.held_out, few),
            held_out_targets=job.held_out_targets[few],
            folder=job.folder / "pace",
        )
        curve = learn(looked, lambda _: None)
        seconds = (curve[-1]["seconds"] - curve[0]["seconds"]) / PACE_STEPS
        return max(1, int(60 * self.settings.minutes / max(seconds, 1e-6)))


def _part(texts: TokenTexts, chosen: np.ndarray) -> TokenTexts:
    """Return some texts of a training, by their indices, int64 [n]."""
    batches = [texts.batch(np.array([index])) for index in chosen]
    rows = [ids[0][: int(mask.sum())].numpy() for ids, mask, _ in batches]
    return TokenTexts(rows, [int(mask.sum() - pooled.sum()) for _, mask, pooled in batches])
