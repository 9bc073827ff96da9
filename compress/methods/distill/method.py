"""Distil: what is left of a model, or another one, is taught to give the teacher's vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from compress.common.errors import nearest
from compress.data.texts import is_hub
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Estimate, Method
from compress.methods.distill.student import Student
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.methods.distill.data import Lessons, Teacher
    from compress.models.network.segments import Parts
    from compress.models.opened import OpenModel

# Those of `compress.methods.distill.objectives`, named here so that a recipe is checked without torch; a test compares them.
OBJECTIVES = ("cosine", "mse", "similarity", "ranking_kl", "margin")
TARGETS = "targets.npy"
# What a plan takes for a text's length; the texts are not read for it.
TYPICAL_TOKENS = 32


class Distill(Method):
    """Train the model as the steps before left it, or another one, on texts without labels.

    What is zero in pruned layers stays zero, what is in integers stays as it is, and the rest makes up for both.
    Training is kept as it goes: a run that was killed goes on at the last checkpoint.
    """

    method: Literal["distill"] = "distill"
    whole: ClassVar[bool] = True
    anywhere: ClassVar[bool] = True
    texts: str
    """A JSONL file with `text` (`.gz` allowed), a plain text file with one a line, or a dataset of the hub as
    `hub:OWNER/NAME:COLUMN`, with `:SPLIT` behind where it is not `train`."""
    count: int | None = Field(None, ge=2)
    """How many of them, drawn with `seed`; left out: all."""
    held_out: int = Field(1_000, ge=1)
    """Of these, texts that are not trained on; how it goes is judged by them."""
    teacher: str | None = None
    """A model's name or folder; left out: the model that the recipe starts from."""
    student: Student | str | None = None
    """In the place of the model that the recipe starts from: the numbers of a new one, or another model's name or folder."""
    objectives: dict[str, float] = Field({"cosine": 1.0, "similarity": 10.0})
    """What is asked, each with its weight: cosine, mse, similarity, ranking_kl, margin."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the hidden states: each block is to give what the teacher gives before the next block that the student has left.
    For what is left of the model that the recipe starts from, which is then the teacher and runs beside."""
    hard_negatives: int = Field(0, ge=0)
    """Texts that the teacher puts closest to each, learned in the same batch; for `margin` and `ranking_kl` above all."""
    matryoshka: tuple[int, ...] = ()
    """Numbers of leading dimensions at which the same is asked besides."""
    prompts: tuple[str, ...] = ()
    """Put before some of the student's texts, as they stand, in turn: the prefixes that it will be used with."""
    prompted: float = Field(0.25, ge=0, le=1)
    """Share of the texts that get one, where there are `prompts`."""
    teacher_prompts: Literal["same", "none"] = "same"
    """Whether the teacher is given the prompts too."""
    lora: int | None = Field(None, ge=1)
    """Train nothing but low-rank changes of the blocks' linear layers, of this rank, added up in the end; left out: everything."""
    integers: Literal["frozen", "trained"] = "frozen"
    """Of layers and tables that steps before have put into integers: `frozen`, they stay and what is around them learns; `trained`,
    they learn too, values behind them being rounded at every step, and their scales (quantization-aware training)."""
    processes: int | None = Field(None, ge=1)
    """That a batch is shared out among, on a GPU each where there are some; left out: as many as there are GPUs, one on a CPU.
    Their number changes the time and not the result, but for rounding."""
    sharded: bool = False
    """Whether they divide weights, gradients and the optimizer's state among themselves (FSDP), for a student that fits no GPU.
    Not for pruned layers or integers, nor with `hidden` or `lora`."""
    steps: int = Field(2_000, ge=1)
    """Changes of the weights."""
    batch: int = Field(128, ge=2)
    """Texts a step, of all processes together."""
    max_tokens: int = Field(256, ge=8)
    """Texts are cut here, for the student."""
    learning_rate: float = Field(2e-4, gt=0)
    """The greatest; of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises; then it falls to zero as a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    """Of matrices; norms, biases and tables have none."""
    precision: Literal["bf16", "no"] = "bf16"
    """Of the products while training; the weights are float32."""
    accumulate: int = Field(1, ge=1)
    """Batches whose gradients make one step."""
    every: int = Field(200, ge=1)
    """Steps between looks at the held-out texts, and between checkpoints."""
    patience: int | None = Field(None, ge=1)
    """Looks without a better one after which it stops; left out: never."""
    seed: int = 0
    """Of which texts are drawn, their order, and a new student's first weights."""

    @field_validator("objectives")
    @classmethod
    def _known(cls, objectives: dict[str, float]) -> dict[str, float]:
        for name, weight in objectives.items():
            if name not in OBJECTIVES:
                raise ValueError(f"objective {name!r} is not known; {nearest(name, OBJECTIVES)}")
            if weight <= 0:
                raise ValueError(f"objective {name!r} has the weight {weight}; leave it out")
        if not objectives:
            raise ValueError("no objective is given")
        return objectives

    @model_validator(mode="after")
    def _leaves_texts(self) -> Self:
        if self.hidden and (self.student is not None or self.teacher is not None):
            raise ValueError("`hidden` compares what is left of a model with that model; leave `student` and `teacher` out")
        if self.sharded and (self.hidden or self.lora):
            raise ValueError("`sharded` trains all weights and looks at vectors alone; leave `hidden` and `lora` out, or `sharded`")
        if self.processes is not None and self.batch < 2 * self.processes:
            raise ValueError(f"a batch of {self.batch} is too small for {self.processes} processes")
        if self.lora and self.integers == "trained":
            raise ValueError("integers cannot take a low-rank change; leave `lora` out, or `integers`")
        if self.lora and self.student is not None and not isinstance(self.student, str):
            raise ValueError("a new student has nothing yet that a low-rank change could start from; leave `lora` out")
        if self.count is not None and self.count - self.held_out < self.batch:
            raise ValueError("`count` leaves less than a batch besides the held-out texts")
        return self

    @property
    def reads(self) -> tuple[str, ...]:
        """The texts, where they are in a file."""
        return () if is_hub(self.texts) else (self.texts,)

    def prepare(self, model: OpenModel, survey: Survey, bench: Bench) -> tuple[Self, OpenModel]:
        """Train, or find the training done, and return the student.

        Raises:
            ValueError: there are too few texts, or the student does not allow it.
        """
        from compress.methods.distill.data import Teacher
        from compress.methods.distill.job import WEIGHTS
        from compress.models.files.headers import tensors_in
        from compress.models.files.weights import Weights
        from compress.models.source import find

        device = str(survey.device)
        teacher = Teacher(find(self.teacher) if self.teacher else bench.published, device)
        texts = cache(lambda: self._texts(bench))
        student = self._student(model, bench, teacher, texts)
        found = bench.once(lambda: self._learned(student, teacher, bench, device, *texts()))
        bench.report(found)
        return self, replace(student, weights=Weights(tensors_in(bench.folder / WEIGHTS), student.network, exact=True))

    def _texts(self, bench: Bench) -> tuple[list[str], int]:
        """Read the texts that may be learned from; also return how many may not."""
        from compress.methods.distill.data import different

        texts, evaluated = different(self.texts, bench.evaluated())
        bench.say(f"{self.texts}: {len(texts):,} different texts; {evaluated:,} more are evaluated on and left out")
        return texts, evaluated

    def _student(self, model: OpenModel, bench: Bench, teacher: Teacher, texts: Callable[[], tuple[list[str], int]]) -> OpenModel:
        """Open what is to be trained; a new student is written first, its weights as training begins with them."""
        from safetensors.torch import save_file

        from compress.methods.distill.student import initial_weights
        from compress.models.folder import ModelFolder
        from compress.models.opened import open_model
        from compress.models.source import find

        if self.student is None:
            return model
        if isinstance(self.student, str):
            return open_model(find(self.student))
        folder = bench.folder / "new"
        if not folder.exists():
            partial = folder.with_name("new.partial")
            shutil.rmtree(partial, ignore_errors=True)
            self.student.write(partial, texts()[0])
            known = self.student.tokens == "teacher"
            made = initial_weights(partial, (lambda strings: teacher.embedder.encode(strings, "")) if known else None, self.seed)
            save_file(made, partial / "model.safetensors", metadata={"format": "pt"})
            partial.rename(folder)
        return open_model(ModelFolder("student", folder))

    def _learned(
        self, student: OpenModel, teacher: Teacher, bench: Bench, device: str, texts: Sequence[str], evaluated: int
    ) -> dict[str, Any]:
        """Train, write the weights, return what is worth recording."""
        import numpy as np

        from compress.methods.distill.data import lessons
        from compress.methods.distill.job import Job, learn
        from compress.methods.distill.mining import neighbours
        from compress.methods.distill.training import tokenized

        if self.hidden:
            self._check_tokens(student, bench)
        same = self.teacher_prompts == "same"
        held, taught = self._split(lessons(texts, self.count, self.prompts, self.prompted, same_prompts=same, seed=self.seed))
        bench.say(f"teacher {teacher.embedder.name}: vectors of {len(taught.texts) + len(held.texts):,} texts")
        targets, judged = teacher.vectors(taught), teacher.vectors(held)
        teacher.embedder.close()
        bench.folder.mkdir(parents=True, exist_ok=True)
        np.save(bench.folder / TARGETS, targets)
        near = neighbours(targets, self.hard_negatives) if self.hard_negatives else None
        del targets  # mapped from the file by whoever learns
        rows = [tokenized(student.tokenizer, part.texts, part.prompts, student.spec, self.max_tokens) for part in (taught, held)]
        curve = learn(
            Job(
                step=self,
                student=student,
                published=bench.published,
                texts=rows[0],
                targets=bench.folder / TARGETS,
                held_out=(rows[1], judged),
                neighbours=near,
                folder=bench.folder,
                device=device,
            ),
            bench.say,
        )
        return {"curve": curve, "texts": len(taught.texts), "left_out": evaluated, "tokens": int(rows[0].lengths.sum())}

    def _check_tokens(self, student: OpenModel, bench: Bench) -> None:
        """See that student and teacher take the same tokens, so that hidden states can be compared.

        Raises:
            ValueError: they do not.
        """
        if bench.published.tokenizer.definition()["model"] != student.tokenizer.definition()["model"]:
            raise ValueError("`hidden` wants the student to take the teacher's tokens; put vocabulary behind it, or leave one out")

    def _split(self, everything: Lessons) -> tuple[Lessons, Lessons]:
        """Put the held-out texts aside.

        Raises:
            ValueError: what is left does not fill a batch.
        """
        import numpy as np

        numbers = np.arange(len(everything.texts))
        if len(numbers) - self.held_out < self.batch:
            left = len(numbers) - self.held_out
            raise ValueError(f"{self.texts}: {left:,} texts besides those held out, less than a batch of {self.batch}")
        return everything.part(numbers[: self.held_out]), everything.part(numbers[self.held_out :])

    def estimate(self, shape: ModelShape) -> Estimate:
        """Size after: the same model, or the new one. Memory and time: the teacher on each text once, then the training."""
        from compress.methods.distill.cost import GPU_COUNTS, Training, low_rank_parameters

        after = self._shape_of(shape)
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
            f"{self.batch * self.accumulate} texts, some {shown * TYPICAL_TOKENS / 1e6:,.1f} M tokens",
        )

    def _teacher_shape(self, shape: ModelShape) -> ModelShape:
        if self.teacher is None:
            return shape
        from compress.models.source import find_shape

        return find_shape(self.teacher)

    def _shape_of(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the student: the model's own, another's, or a new one's from its numbers alone."""
        if self.student is None:
            return shape.as_stored()
        if isinstance(self.student, str):
            from compress.models.source import find_shape

            return find_shape(self.student).as_stored()
        tensors = {name: TensorInfo("F16", size) for name, size in self.student.tensors().items()}
        return ModelShape(shape.name, tensors, self.student.config(self.student.vocabulary))

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Do nothing: the weights are the student's before the walk."""
        return {}
