"""The YAML keys of `distill` and the checks on them: read by the method, by the job and by the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from compress.common.errors import nearest
from compress.data.texts import is_hub
from compress.methods.base import Method
from compress.methods.distill.static_student import StaticStudent
from compress.methods.distill.student import Student
from compress.models.shape import ModelShape

# The functions of `compress.methods.distill.objectives`, named here so that a recipe is checked without torch. A test compares
# both.
OBJECTIVE_NAMES = ("cosine", "mse", "similarity", "ranking_kl", "margin")


def _kind(student: Any) -> str:
    """Return which kind of `student` is meant; pydantic then judges, and names in errors, the keys of that kind alone."""
    if isinstance(student, str):
        return "name"
    architecture = student.get("architecture") if isinstance(student, Mapping) else getattr(student, "architecture", None)
    return "static" if architecture == "static" else "new"


AnyStudent = Annotated[
    Annotated[Student, Tag("new")] | Annotated[StaticStudent, Tag("static")] | Annotated[str, Tag("name")], Discriminator(_kind)
]


class DistillSettings(Method):
    """What a recipe may set for `distill`."""

    family: ClassVar[str] = "distilled"
    whole: ClassVar[bool] = True
    anywhere: ClassVar[bool] = True
    without_blocks: ClassVar[bool] = True
    spreads: ClassVar[tuple[str, ...]] = ("steps", "first_batch")
    texts: str
    """Texts to train on: a JSONL file with `text` (`.gz` allowed), a plain text file with one text per line, or a dataset of the
    hub as `hub:OWNER/NAME:COLUMN`, followed by `:SPLIT` when the split is not `train`."""
    count: int | None = Field(None, ge=2)
    """Number of texts to use, held-out ones included, drawn with `seed`; by default all of them."""
    held_out: int = Field(1_000, ge=1)
    """Number of these texts that are not trained on; training is judged by them."""
    teacher: str | None = None
    """Name or folder of the teacher model; by default the model that the recipe starts from."""
    student: AnyStudent | None = None
    """The model to train: the sizes of a new one, or the name or folder of an existing one; by default the model as the steps
    before left it."""
    objectives: dict[str, float] = Field({"cosine": 1.0, "similarity": 10.0})
    """Loss terms and their weights; the terms are cosine, mse, similarity, ranking_kl and margin."""
    hidden: float = Field(0.0, ge=0)
    """Weight of the hidden-state loss: each student block matches the teacher's state just before the student's next kept block.
    Only for a model pruned from the recipe's own, which is then the teacher and runs next to it."""
    hard_negatives: int = Field(0, ge=0)
    """Number of nearest neighbours, by the teacher's vectors, that are put in the same batch as each text; most useful for `margin`
    and `ranking_kl`."""
    matryoshka: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of leading dimensions for which the objectives are computed in addition to the full vectors."""
    depth: Literal["any"] | None = None
    """`any` trains one student whose vectors are good after each of its blocks, so that it can be cut to any depth afterwards
    (`compress export RUN --depth 3`). By default only the vectors after the last block are trained."""
    exits: int = Field(2, ge=1)
    """Number of shallower depths that each batch is compared at with `depth: any`, in addition to the whole depth; drawn anew for
    each batch, and all of them where there are not so many."""
    prompts: tuple[str, ...] = ()
    """Prompts put before some of the student's texts, verbatim and in turn: the prefixes that the model will be used with."""
    prompted: float = Field(0.25, ge=0, le=1)
    """Share of the texts that get one of the `prompts`, if there are any."""
    teacher_prompts: Literal["same", "none"] = "same"
    """Whether the teacher gets the same prompts as the student (`same`) or none."""
    lora: int | None = Field(None, ge=1)
    """Rank of low-rank updates of the blocks' linear layers; only these are trained, and merged at the end. By default all weights
    are trained."""
    integers: Literal["frozen", "trained"] = "frozen"
    """What happens to layers and tables that earlier steps quantized to integers. `frozen`: they stay fixed and everything around
    them is trained. `trained`: they are trained too, with their scales; the values underneath are rounded at every step
    (quantization-aware training)."""
    processes: int | None = Field(None, ge=1)
    """Number of processes that share each batch, one per GPU if there are any; by default one per GPU, or one on a CPU, or one on
    each rank that torchrun or Ray Train started. It changes the time, not the result (except for rounding)."""
    sharded: bool = False
    """Whether the processes split weights, gradients and optimizer state among themselves (FSDP), for a student that fits on no
    single GPU. Not for pruned or quantized layers, and not together with `hidden` or `lora`."""
    steps: int = Field(2_000, ge=1)
    """Number of optimizer steps."""
    batch: int = Field(128, ge=2)
    """Texts per batch, over all processes."""
    first_batch: int = Field(0, ge=0)
    """Number, from 0, of the first batch in the order that follows from `seed`. A training that goes on with the texts of another
    one starts at the batch after that one's last."""
    max_tokens: int = Field(256, ge=8)
    """Number of tokens at which the student's texts are cut."""
    learning_rate: float = Field(2e-4, gt=0)
    """Peak learning rate of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises linearly; after that it falls to zero along a cosine."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay of matrices; norms, biases and embedding tables have none."""
    precision: Literal["bf16", "no"] = "bf16"
    """Precision of matrix products during training: `bf16` for bfloat16 autocast, `no` for float32. Weights are always float32."""
    accumulate: int = Field(1, ge=1)
    """Number of batches whose gradients are averaged into one step."""
    every: int = Field(200, ge=1)
    """Number of steps between evaluations on the held-out texts; each also writes a checkpoint."""
    patience: int | None = Field(None, ge=1)
    """Number of evaluations without improvement after which training stops; by default it never stops early."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the choice of texts, of their order, and of a new student's initial weights."""

    @field_validator("objectives")
    @classmethod
    def _known(cls, objectives: dict[str, float]) -> dict[str, float]:
        for name, weight in objectives.items():
            if name not in OBJECTIVE_NAMES:
                raise ValueError(f"objective {name!r} is not known; {nearest(name, OBJECTIVE_NAMES)}")
            if weight <= 0:
                raise ValueError(f"objective {name!r} has the weight {weight}; leave it out")
        if not objectives:
            raise ValueError("no objective is given")
        return objectives

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.hidden and (self.student is not None or self.teacher is not None):
            raise ValueError("`hidden` compares a pruned model with the model it came from; leave `student` and `teacher` out")
        if not self.prompts and (self.prompted != 0.25 or self.teacher_prompts != "same"):
            raise ValueError("`prompted` and `teacher_prompts` have no effect without `prompts`")
        if len(set(self.matryoshka)) != len(self.matryoshka):
            raise ValueError("`matryoshka` names a number of dimensions twice")
        self._check_depth()
        if self.sharded and (self.hidden or self.lora):
            raise ValueError("`sharded` trains all weights and compares only vectors; leave out `hidden` and `lora`, or `sharded`")
        if self.processes is not None and self.batch < 2 * self.processes:
            raise ValueError(f"a batch of {self.batch} is too small for {self.processes} processes")
        if self.lora and self.integers == "trained":
            raise ValueError("integers cannot take a low-rank update; leave `lora` out, or `integers`")
        if self.lora and self.student is not None and not isinstance(self.student, str):
            raise ValueError("a new student has no trained weights that a low-rank update could start from; leave `lora` out")
        if self.count is not None and self.count - self.held_out < self.batch:
            raise ValueError("`count` minus `held_out` leaves less than one batch of texts to train on")
        return self

    def _check_depth(self) -> None:
        """See that a student of any depth is asked for with what such a training can do.

        Raises:
            ValueError: it is not.
        """
        if self.depth is None:
            if self.exits != 2:
                raise ValueError("`exits` has no effect without `depth: any`")
            return
        if isinstance(self.student, StaticStudent):
            raise ValueError("a static table has no blocks that it could be cut to; leave `depth` out")
        if self.hidden:
            raise ValueError(
                "`depth: any` makes each block's output a last one, `hidden` the teacher's in between; leave one of them out"
            )
        if self.lora:
            raise ValueError("`lora` keeps the norm and the head that all depths share as they are; leave it out, or `depth`")

    def unspread(self, rounds: int) -> tuple[str, str] | None:
        """Return the key because of which the step cannot be done in so many rounds, and the reason; None where it can be."""
        if self.student is not None:
            return "student", "is another model than the one that the rounds prune; leave it out"
        if self.steps <= rounds:
            return (
                "steps",
                f"{self.steps} are too few for {rounds} rounds, the last of which gets two shares; give {rounds + 1}",
            )
        return None

    def spread(self, rounds: int, shape: ModelShape) -> tuple[Self | None, ...]:
        """Return the step of each round: all get one share of the steps, the last one two and what does not divide.

        Each round goes on with the texts after those of the round before; what is held out stays the same.
        """
        share = self.steps // (rounds + 1)
        counts = [*[share] * (rounds - 1), self.steps - share * (rounds - 1)]
        firsts = [self.first_batch + share * number * self.accumulate for number in range(rounds)]
        return tuple(
            self.model_copy(update={"steps": count, "first_batch": first}) for count, first in zip(counts, firsts, strict=True)
        )

    @property
    def reads(self) -> tuple[str, ...]:
        """The texts, if they are in a file."""
        return () if is_hub(self.texts) else (self.texts,)
