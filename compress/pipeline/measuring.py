"""What a run measures: scores, fidelity and speed of the variant, each against the baseline."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from compress.common.errors import UserError, nearest
from compress.common.memory import available_memory_bytes, gigabytes
from compress.data.texts import calibration_texts
from compress.measure.scored import Scored, baseline_key
from compress.measure.speed.timing import Candidate, measure_speed
from compress.measure.vectors.codec import rotation
from compress.measure.vectors.fidelity import Fidelity, cosines, fidelity
from compress.models.files.headers import weight_bytes
from compress.models.folder import ModelFolder
from compress.models.source import DTYPE_BYTES
from compress.pipeline.findings import VARIANT, CutFindings
from compress.runtimes.loading import open_source

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compress.common.journal import Journal
    from compress.measure.accuracy.score import TaskScore
    from compress.measure.accuracy.tasks import Task
    from compress.models.embedder import Embedder
    from compress.models.shape import ModelShape
    from compress.pipeline.plan import Plan
    from compress.pipeline.recipe import Recipe

# float32 stands in for float16 where the lowest cosine between the two, over so many texts, is at least this.
STAND_IN_COSINE = 1 - 1e-4
STAND_IN_TEXTS = 32
# Equally long texts that are timed on a GPU, as batch size and tokens: one query, and a batch that keeps a large card busy.
EQUAL_LENGTHS = ((1, 32), (32, 512))
# Compute capability from which a card multiplies bfloat16.
BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Reference:
    """Precision of the baseline that accuracy and fidelity are compared with."""

    dtype: str
    why: str
    """Why this precision, for the record."""


@dataclass(frozen=True)
class Measurements:
    """Measures a run's baseline and variant; whatever takes long is kept by the run's journal and not measured twice."""

    name: str
    """Name of the run."""
    recipe: Recipe
    source: ModelFolder
    """The baseline."""
    fingerprint: str
    """Fingerprint of the baseline's files."""
    shape: ModelShape
    """Shape of the baseline."""
    plan: Plan
    variant: Path
    """Folder of the variant."""
    tasks: Sequence[Task]
    texts: Sequence[str]
    """Texts for fidelity and speed."""
    device: str
    journal: Journal
    say: Callable[[str], None]
    """Called with a line of progress."""

    def reference(self) -> Reference:
        """Choose the baseline's precision: float16, or on a CPU float32 in its place once both are seen to agree."""
        asked = self.recipe.evaluate.baseline
        if asked != "auto":
            return Reference(asked, "as the recipe says")
        if self.device != "cpu":
            return Reference("float16", "half precision, as the model is published to run")
        return Reference(**self.journal.once("reference", self._stand_in))

    def _stand_in(self) -> dict[str, Any]:
        """Compare the baseline's vectors in float16 with those in float32; the fields of a `Reference`."""
        texts = self.texts[:STAND_IN_TEXTS]
        halves = (self.scored("baseline", dtype).embedder for dtype in ("float16", "float32"))
        vectors = []
        for embedder in halves:
            vectors.append(embedder.encode(texts))
            embedder.close()
        worst = float(cosines(*vectors).min())
        agree = worst >= STAND_IN_COSINE
        why = f"{'stands in for' if agree else 'used, because float32 differs from'} float16: " + (
            f"lowest cosine between the two {worst:.7f} on {len(texts)} of the run's texts"
        )
        return {"dtype": "float32" if agree else "float16", "why": why}

    def scored(self, role: str, dtype: str | None) -> Scored:
        """Return a model as tasks see it. The baseline's vectors and scores are kept for other runs, the variant's for this one."""
        batch_tokens, source = self.recipe.measure.batch_tokens, self._source(role)
        kept = self.journal.folder / "vectors"
        key = kept if role == VARIANT else baseline_key(self.fingerprint, dtype, self.device, batch_tokens)
        return Scored(
            source, partial(self._open, role, dtype), key, batch_tokens=batch_tokens, prompts=self.recipe.evaluate.prompts
        )

    def _source(self, role: str) -> ModelFolder:
        return ModelFolder(f"{self.name} {role}", self.variant) if role == VARIANT else self.source

    def _open(self, role: str, dtype: str | None) -> Embedder:
        """Open the baseline or the variant; block by block where it does not fit in memory."""
        source = self._source(role)
        needed = self.plan.variant_bytes if role == VARIANT else self.shape.parameters * DTYPE_BYTES[dtype or "float32"]
        stream = not self._fits(needed)
        if stream:
            self.say(f"{role}: {gigabytes(needed)} do not fit in memory; read block by block")
        return open_source(source, device=self.device, dtype=dtype, stream=stream)

    def _fits(self, needed: int) -> bool:
        """Whether so many bytes of weights fit in memory next to what running takes. A GPU raises its own error."""
        return self.device != "cpu" or needed + self.plan.run_memory_bytes - self.plan.variant_bytes < available_memory_bytes()

    def scores(self, models: Mapping[str, Scored]) -> dict[str, dict[str, TaskScore]]:
        """Score models, by role, on every task; only one of them is in memory at a time. Returns scores by task, then by role."""
        if not self.tasks:
            return {}
        from compress.measure.accuracy.score import TaskScore

        scores: dict[str, dict[str, TaskScore]] = {}
        for role, model in models.items():
            for number, task in enumerate(self.tasks, start=1):
                make = partial(_score, model, task)
                score = TaskScore(**self.journal.once(f"accuracy {role} {task.name}", make))
                scores.setdefault(task.name, {})[role] = score
                place = f"{number}/{len(self.tasks)}"
                self.say(f"{role} {place} {task.name}: {score.metric} {100 * score.score:.2f} ({score.seconds:.0f} s)")
            model.embedder.close()
        return scores

    def index(self, baseline: Scored, variant: Scored) -> dict[str, dict[str, float]]:
        """Score retrieval with one model's queries on the other's documents, by task; empty where their widths differ."""
        found: dict[str, dict[str, float]] = {}
        if baseline.embedder.dimension != variant.embedder.dimension:
            return found
        turn = None
        if self.recipe.evaluate.rotation:
            turn = rotation(*(model.embedder.encode(calibration_texts()) for model in (variant, baseline)))
        for task in self.tasks:
            if task.mteb.metadata.type != "Retrieval":
                continue
            found[task.name] = {
                "variant queries, baseline documents": variant.score_on(task, baseline),
                "baseline queries, variant documents": baseline.score_on(task, variant),
            }
            if turn is not None:
                found[task.name]["rotated variant queries, baseline documents"] = variant.score_on(task, baseline, turn)
                found[task.name]["rotated baseline queries, variant documents"] = baseline.score_on(task, variant, turn.T)
            self.say(f"index {task.name}: " + "; ".join(f"{pair} {100 * score:.2f}" for pair, score in found[task.name].items()))
        return found

    def fidelity(self, models: Mapping[str, Scored]) -> Fidelity:
        """Compare the vectors of the baseline and the variant, in this order."""
        vectors = []
        for model in models.values():
            vectors.append(model.embedder.encode(self.texts))
            model.embedder.close()
        return fidelity(vectors[0], vectors[1], self.texts)

    def depths(self, baseline: Scored, reference: Mapping[str, TaskScore]) -> list[CutFindings]:
        """Measure the variant at each shallower depth to which it was trained to be cut.

        Args:
            baseline: what it is compared with.
            reference: the baseline's scores, by task.
        """
        source = self._source(VARIANT)
        found = []
        for depth in source.compressed.depths:
            if depth < len(source.shape.layers):
                found.append(CutFindings.of(self.journal.once(f"depth {depth}", partial(self._at_depth, source, depth, baseline))))
                self.say(f"depth {depth}: {found[-1].in_short(reference)}")
        return found

    def _at_depth(self, source: ModelFolder, depth: int, baseline: Scored) -> dict[str, Any]:
        """Cut the variant, measure it, and delete it again; the fields of `CutFindings` as JSON."""
        from compress.models.cut import cut

        folder = self.journal.folder / f"depth-{depth}"
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
        folder.mkdir()
        part = cut(source, depth, folder)
        # Its vectors are not kept: each depth has others, and a killed run embeds the texts of one depth again.
        prompts, batch_tokens = self.recipe.evaluate.prompts, self.recipe.measure.batch_tokens
        opened = partial(open_source, part, device=self.device, stream=not self._fits(weight_bytes(folder)))
        scored = Scored(part, opened, folder / "vectors", batch_tokens=batch_tokens, prompts=prompts)
        made: dict[str, Any] = {"depth": depth, "size_bytes": weight_bytes(folder)}
        made["scores"] = {task.name: scored.score(task).model_dump(mode="json") for task in self.tasks}
        if "fidelity" in self.recipe.measure.what:
            made["agreement"] = self.fidelity({"baseline": baseline, "cut": scored}).model_dump()
        scored.embedder.close()
        shutil.rmtree(folder)
        return made

    def speed(self) -> dict[str, Any]:
        """Measure baselines and variant in fresh processes; return their `Speed` as JSON, by dtype or `variant`."""
        candidates = {
            dtype: Candidate({"model": str(self.source.path), "device": self.device, "dtype": dtype})
            for dtype in self._dtypes_that_fit()
        }
        candidates[VARIANT] = Candidate({"model": str(self.variant), "device": self.device})
        measure = self.recipe.measure
        self.say(f"speed: {', '.join(candidates)}, {measure.rounds} rounds of {measure.count} texts, each in a process of its own")
        speeds = measure_speed(
            candidates,
            self.texts,
            rounds=measure.rounds,
            requests=measure.requests,
            batch_tokens=measure.batch_tokens,
            cells=[(batch, length) for batch in measure.batches for length in measure.lengths] or self._equal_lengths(),
            threads=measure.threads,
        )
        return {name: speed.model_dump() for name, speed in speeds.items()}

    def _equal_lengths(self) -> Sequence[tuple[int, int]]:
        """Return the batch sizes and lengths that are timed where the recipe names none: on a GPU a query and a full batch."""
        return () if self.device == "cpu" else EQUAL_LENGTHS

    def _fits_together(self, needed: int) -> bool:
        """Whether so many bytes of weights, of several processes, fit in the memory of the device next to what running takes."""
        if self.device == "cpu":
            return self._fits(needed)
        import torch

        free, _ = torch.cuda.mem_get_info(self.device)
        return needed + self.plan.run_memory_bytes - self.plan.variant_bytes < free

    def _dtypes_that_fit(self) -> list[str]:
        """Leave out baselines that do not fit in memory next to the variant, largest first; all are loaded at the same time."""
        dtypes = list(self._dtypes())
        while dtypes and not self._fits_together(
            self.plan.variant_bytes + sum(self.shape.parameters * DTYPE_BYTES[dtype] for dtype in dtypes)
        ):
            largest = max(dtypes, key=DTYPE_BYTES.__getitem__)
            self.say(f"speed: the {largest} baseline does not fit in memory next to the others; it is left out")
            dtypes.remove(largest)
        if not dtypes and not self._fits_together(self.plan.variant_bytes):
            raise UserError(
                f"speed: the variant takes {gigabytes(self.plan.variant_bytes)} and does not fit in memory",
                "set measure.what to [] to measure nothing",
            )
        return dtypes

    def _dtypes(self) -> tuple[str, ...]:
        """Return the precisions that speed is compared with; gates look at the first.

        bfloat16 is one only where the device multiplies it. Elsewhere it is several times slower, so no baseline at all.
        """
        import torch

        if self.device != "cpu":
            multiplies = torch.cuda.get_device_capability(self.device) >= BFLOAT16_CAPABILITY
            return ("float16", "bfloat16") if multiplies else ("float16",)
        from compress.layers.float_layers import has_onednn_linear

        return ("float32", "bfloat16") if has_onednn_linear(torch.bfloat16) else ("float32",)


def _score(model: Scored, task: Task) -> dict[str, Any]:
    return model.score(task).model_dump(mode="json")


def check_prompts(prompts: Mapping[str, str], tasks: Sequence[Task]) -> None:
    """Check that every prompt of a recipe is one that a task of the run looks for.

    Raises:
        UserError: one is not.
    """
    roles = ("query", "document")
    owners = {name for task in tasks for name in (task.name, task.mteb.metadata.type)}
    known = owners | {f"{owner}-{role}" for owner in owners for role in roles} | set(roles)
    for name in prompts:
        if name not in known:
            raise UserError(f"evaluate.prompts: no task of this run looks for {name!r}", nearest(name, sorted(known)))
