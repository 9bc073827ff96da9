"""Distillation: a pruned model, or another one, is trained to give the teacher's vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Self

from compress.common.files import naming, save_array, sync_tree
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate
from compress.methods.distill.settings import DistillSettings
from compress.methods.distill.static_student import AXES_FILE, StaticStudent
from compress.models.architectures import LAYER_WEIGHTS
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from pathlib import Path

    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.methods.distill.data import Lessons, Teacher
    from compress.models.embedder import Vectors
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

TARGETS, NEW = "targets.npy", "new"
# Text length that a plan assumes; the texts are not read for it.
TYPICAL_TOKENS = 32
# Texts whose vectors say along which axes a static table's teacher is reduced.
AXES_TEXTS = 20_000


class Distill(DistillSettings):
    """Train the model as earlier steps left it, or another one, on texts without labels, to give the teacher's vectors.

    Zeros of pruned layers stay zero, integers stay fixed by default, and the other weights make up for both. A run that was killed
    resumes at the last checkpoint.
    """

    method: Literal["distill"] = "distill"

    def shared_by(self, ranks: int) -> bool:
        """Return that it can be: each rank has one process of the training, with its share of every batch.

        Raises:
            ValueError: `processes` is another number, or they cannot share a batch evenly.
        """
        if self.processes not in (None, ranks):
            raise ValueError(f"`processes: {self.processes}`, and {ranks} ranks were started; leave it out, or start as many")
        if self.batch < 2 * ranks:
            raise ValueError(f"a batch of {self.batch} is too small for {ranks} ranks")
        if self.batch % ranks:
            raise ValueError(f"a batch of {self.batch} cannot be shared evenly by {ranks} ranks; make it a multiple")
        return True

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Train the student, or find it trained, and return it.

        Raises:
            ValueError: there are too few texts, or the student does not allow it.
        """
        from compress.methods.distill.data import Teacher
        from compress.methods.distill.job import WEIGHTS
        from compress.models.files.headers import tensors_in
        from compress.models.files.weights import Weights
        from compress.models.source import find

        device = str(survey.device)
        source = find(self.teacher) if self.teacher else bench.published
        teacher = Teacher(source, device)
        texts = cache(lambda: self._texts(bench))
        student = self._student(model, bench, teacher, texts)
        self._check_dimensions(student.spec.dimension(student.shape.hidden_size))
        found = bench.once(lambda: self._learned(student, teacher, bench, device, *texts()))
        bench.report(found)
        to = student.aligned_to
        # Training towards another model leaves the space that the vectors were mapped into.
        kept = to if to is not None and to.fingerprint == source.fingerprint else None
        weights = Weights(tensors_in(bench.folder / WEIGHTS), student.network, exact=True)
        depths = tuple(range(1, len(student.layers) + 1)) if self.depth else ()
        return self, replace(student, weights=weights, aligned_to=kept, depths=depths)

    def _check_dimensions(self, whole: int) -> None:
        """See that `matryoshka` names parts of the student's vectors, which have `whole` dimensions.

        Raises:
            ValueError: one is as wide as the whole, or wider.
        """
        beyond = [width for width in self.matryoshka if width >= whole]
        if beyond:
            raise ValueError(f"`matryoshka: {beyond[0]}` has no effect: the student's vectors have {whole} dimensions")

    def _texts(self, bench: Bench) -> tuple[list[str], int]:
        """Read the texts that may be trained on; also return how many may not."""
        from compress.methods.distill.data import different

        texts, evaluated = different(self.texts, bench.evaluated())
        bench.say(f"{self.texts}: {len(texts):,} different texts; {evaluated:,} more are in the evaluation and left out")
        return texts, evaluated

    def _student(self, model: OpenModel, bench: Bench, teacher: Teacher, texts: Callable[[], tuple[list[str], int]]) -> OpenModel:
        """Open the model to train; a new student is first written to disk with its initial weights."""
        from safetensors.torch import save_file

        from compress.models.folder import ModelFolder
        from compress.models.opened import open_model
        from compress.models.source import find

        if self.student is None:
            return model
        if isinstance(self.student, str):
            return open_model(find(self.student))
        folder = bench.folder / NEW
        if not folder.exists():
            partial = folder.with_name(f"{NEW}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            made = self._new(partial, teacher, texts()[0])
            with naming(partial):
                save_file(made, partial / "model.safetensors", metadata={"format": "pt"})
            sync_tree(partial)
            partial.rename(folder)
        return open_model(ModelFolder("student", folder))

    def _new(self, folder: Path, teacher: Teacher, texts: Sequence[str]) -> dict[str, Any]:
        """Write a new student without its weights; return its initial weights by tensor name."""
        from compress.methods.distill.student import initial_weights

        assert self.student is not None
        assert not isinstance(self.student, str)
        if isinstance(self.student, StaticStudent):
            return self._new_table(self.student, folder, teacher, texts)
        self.student.write(folder, texts)
        known = self.student.tokens == "teacher"
        return initial_weights(folder, (lambda strings: teacher.embedder.encode(strings, "")) if known else None, self.seed)

    def _new_table(self, student: StaticStudent, folder: Path, teacher: Teacher, texts: Sequence[str]) -> dict[str, Any]:
        """Write a static table without its vectors, and the axes that the teacher's are reduced to; return its initial tensors."""
        import torch

        from compress.methods.distill.static_table import principal_axes, strings_of
        from compress.models.text.tokens import open_tokenizer, unknown_token

        counts = student.write(folder, teacher.source.tokenizer, texts)
        axes = principal_axes(teacher.vectors(self._drawn(texts)[1].first(AXES_TEXTS)), student.width)
        save_array(folder / AXES_FILE, axes)
        tokenizer = open_tokenizer(folder)
        vectors = teacher.embedder.encode(strings_of(tokenizer), "")
        made = student.initial_weights(vectors, axes, counts, unknown_token(tokenizer))
        return {name: torch.from_numpy(array) for name, array in made.items()}

    def _drawn(self, texts: Sequence[str]) -> tuple[Lessons, Lessons]:
        """Draw the texts of the training, each with its prompts; return the held-out ones and those to train on."""
        from compress.methods.distill.data import lessons

        same = self.teacher_prompts == "same"
        return self._split(lessons(texts, self.count, self.prompts, self.prompted, same_prompts=same, seed=self.seed))

    def _targets(self, teacher: Teacher, taught: Lessons, folder: Path) -> Vectors:
        """Return what the student learns to give: the teacher's vectors, for a static table along the axes in its folder."""
        import numpy as np

        from compress.methods.distill.static_table import reduced

        vectors = teacher.vectors(taught)
        return reduced(vectors, np.load(folder / AXES_FILE)) if isinstance(self.student, StaticStudent) else vectors

    def _learned(
        self, student: OpenModel, teacher: Teacher, bench: Bench, device: str, texts: Sequence[str], evaluated: int
    ) -> dict[str, Any]:
        """Train, write the weights, and return what goes into the record."""
        from compress.methods.distill.batches import tokenized
        from compress.methods.distill.job import Job, learn
        from compress.methods.distill.mining import neighbours

        if self.hidden:
            self._check_tokens(student, bench)
        held, taught = self._drawn(texts)
        bench.say(f"teacher {teacher.embedder.name}: vectors of {len(taught.texts) + len(held.texts):,} texts")
        targets, judged = (self._targets(teacher, part, bench.folder / NEW) for part in (taught, held))
        teacher.embedder.close()
        bench.folder.mkdir(parents=True, exist_ok=True)
        save_array(bench.folder / TARGETS, targets)
        near = neighbours(targets, self.hard_negatives) if self.hard_negatives else None
        del targets  # every process maps them from the file
        rows, held_rows = (
            tokenized(student.tokenizer, part.texts, part.prompts, student.spec, self.max_tokens) for part in (taught, held)
        )
        job = Job(
            settings=self,
            student=student,
            published=bench.published,
            texts=rows,
            targets=bench.folder / TARGETS,
            held_out=held_rows,
            held_out_targets=judged,
            neighbours=near,
            folder=bench.folder,
            device=device,
        )
        curve = learn(job, bench.say, bench.ranks)
        return {"curve": curve, "texts": len(taught.texts), "left_out": evaluated, "tokens": int(rows.lengths.sum())}

    def _check_exits(self, student: ModelShape) -> None:
        """See that `depth: any` asks for what a student of this shape can be: cut after any of its blocks.

        Raises:
            ValueError: it cannot.
        """
        if student.blocks == 1:
            raise ValueError("`depth: any` has no effect on a student of one block; leave it out")
        if LAYER_WEIGHTS in student.tensors:
            raise ValueError("`depth: any`: WeightedLayerPooling averages the outputs of all blocks, so that none can be left out")
        if student.setting("hidden_size_per_layer_input"):
            raise ValueError(f"`depth: any`: the tables of {student.name} hold a row of numbers for each block; it cannot be cut")

    def _check_tokens(self, student: OpenModel, bench: Bench) -> None:
        """Check that student and teacher take the same tokens, so that hidden states can be compared.

        Raises:
            ValueError: they do not.
        """
        if bench.published.tokenizer.definition()["model"] != student.tokenizer.definition()["model"]:
            raise ValueError(
                "`hidden` needs the student to take the teacher's tokens; put vocabulary after distill, or leave one of them out"
            )

    def _split(self, everything: Lessons) -> tuple[Lessons, Lessons]:
        """Return the held-out texts and those to train on.

        Raises:
            ValueError: the texts to train on do not fill a batch.
        """
        import numpy as np

        numbers = np.arange(len(everything.texts))
        if len(numbers) - self.held_out < self.batch:
            left = len(numbers) - self.held_out
            raise ValueError(
                f"{self.texts}: {left:,} texts are left after holding out {self.held_out:,}, less than a batch of {self.batch}"
            )
        return everything.part(numbers[: self.held_out]), everything.part(numbers[self.held_out :])

    def estimate(self, shape: ModelShape) -> Estimate:
        """Estimate the size of the student, and the memory and time of running the teacher once on each text and then training."""
        from compress.methods.distill.cost import GPU_COUNTS, Training, low_rank_parameters

        after = self._shape_of(shape)
        if not after.blocks and (self.hidden or self.lora or self.sharded or self.depth):
            raise ValueError("a static table has no blocks; leave out `hidden`, `lora`, `sharded` and `depth`")
        if self.depth:
            self._check_exits(after)
        if after.vector_width is not None:  # a student of its own tells its width once it is open
            self._check_dimensions(after.vector_width)
        teacher = self._teacher_shape(shape)
        learning = after.packed_parameters if self.integers == "trained" else 0
        training = Training(
            student=after,
            trained=low_rank_parameters(after, self.lora) if self.lora else after.parameters + learning,
            batch=self.batch,
            batches=self.steps * self.accumulate,
            length=TYPICAL_TOKENS,
            sharded=self.sharded,
            follows=teacher if self.hidden else None,
            exits=min(self.exits, after.blocks - 1) if self.depth else 0,
        )
        shown = training.batches * training.batch
        texts = min(shown, self.count or shown) + self.held_out
        asked = texts * TYPICAL_TOKENS * teacher.flops_per_token(TYPICAL_TOKENS)
        vectors = 4 * texts * teacher.hidden_size
        memory = {devices: max(teacher.half_bytes, training.memory_bytes(devices)) for devices in GPU_COUNTS}
        return Estimate(
            after=after,
            memory_bytes=memory[1] + vectors,
            bytes_touched=16 * self.steps * training.trained,
            flops=asked + training.operations,
            gpus={devices: (memory[devices], asked + training.operations / devices) for devices in GPU_COUNTS},
            note=f"{training.trained / 1e6:,.1f} M parameters trained for {self.steps:,} steps of "
            f"{self.batch * self.accumulate} texts, about {shown * TYPICAL_TOKENS / 1e6:,.1f} M tokens"
            + (f", each at the whole depth and {training.exits} of {after.blocks - 1} shallower ones" if self.depth else ""),
        )

    def _teacher_shape(self, shape: ModelShape) -> ModelShape:
        if self.teacher is None:
            return shape
        from compress.models.source import find_shape

        return find_shape(self.teacher)

    def _shape_of(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the student: the model's own, another model's, or a new one's from its settings."""
        if self.student is None:
            return shape.as_stored()
        if isinstance(self.student, str):
            from compress.models.source import find_shape

            return find_shape(self.student).as_stored()
        if isinstance(self.student, StaticStudent):
            return self.student.shape(self._teacher_shape(shape))
        tensors = {name: TensorInfo("F16", size) for name, size in self.student.tensors().items()}
        return ModelShape(shape.name, tensors, self.student.config(self.student.vocabulary))

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Do nothing: `prepare` has replaced the weights before the walk."""
        return {}
