"""What a recipe may say: its sections and keys."""

from __future__ import annotations

from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from compress.export import FORMATS
from compress.methods import method_class
from compress.methods.base import Method
from compress.models.shape import ModelShape
from compress.runtimes.contract import AUTO, RUNTIMES, TORCH

if TYPE_CHECKING:
    RuntimeChoice = str
    ExportChoice = str
else:  # the tables' names, so that a row there is all that a new runtime or format takes
    RuntimeChoice = Literal[(*reversed(RUNTIMES), AUTO)]
    ExportChoice = Literal[("variant", *FORMATS)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Evaluate(Section):
    """Which tasks measure accuracy; none: it is not measured."""

    tasks: tuple[str, ...] = ("mini",)
    """Task names of the mteb package, or `mini`: the embedded suite, which needs no network and no data."""
    prompts: dict[str, str] = {}
    """Prompts in the place of the model's own, as they stand before the texts, by task (`STSBenchmark`), by task and role
    (`SciFact-query`, `SciFact-document`), by type of task (`Classification`) or by role (`query`)."""
    data: str | None = None
    """A folder with the tasks' data, `<task>[/<subset>]/<split>.jsonl[.gz]`; without it the tasks come from the hub."""
    rotation: bool = False
    """Whether one model's queries search the other's index also after a rotation between the two spaces, fitted on the embedded
    calibration texts."""
    margin: float = Field(0.01, ge=0, lt=1)
    """Loss that is accepted on a task and on the mean, as a share of the baseline's score; verdicts are against it."""
    baseline: Literal["auto", "float16", "float32"] = "auto"
    """Precision of the baseline's vectors. `auto`: float16; on a CPU, where that is some ten times slower, float32 once a sample of
    texts has shown that both agree to 1e-4."""


class Calibration(Section):
    """What methods that calibrate are shown; none of it may be a text that the model is evaluated on."""

    texts: str = "embedded"
    """A JSONL file with `text` (`.gz` allowed) or a plain text file with one a line; `embedded`: 512 texts of many kinds that come
    with the project."""
    count: int = Field(512, ge=1)
    """How many of them, drawn with the recipe's seed."""
    max_tokens: int = Field(512, ge=8)
    """Texts are cut here, their prompts included."""
    prompts: Literal["model"] | tuple[str, ...] = "model"
    """Put before the texts in turn, as they stand; `model`: each of the model's own once, nothing where it has none."""


class Measure(Section):
    """What else is measured, and on what."""

    what: tuple[Literal["fidelity", "speed"], ...] = ("fidelity", "speed")
    """`fidelity`: how close the vectors are to the baseline's; `speed`: throughput, latency and memory. Empty: neither."""
    texts: str = "mini"
    """Texts for speed, memory and fidelity: a JSONL file with `text` (`.gz` allowed) or a plain text file with one a line; `mini`:
    texts of mixed lengths made from the embedded suite."""
    count: int = Field(256, ge=8)
    """How many texts a round of the throughput measurement encodes."""
    rounds: int = Field(5, ge=1)
    """Rounds, baselines and variant in turn within each; medians are reported."""
    requests: int = Field(100, ge=10)
    """Single texts encoded one by one for latency."""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Numbers of texts, and"""
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """numbers of tokens: time is measured besides of each batch of equally long texts. Empty: not."""
    batch_tokens: int | None = Field(None, ge=1)
    """Padded tokens a batch may hold; by default what suits the device."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of each measured process; by default all cores."""


class Gates(Section):
    """Bounds that the run must keep; a run that misses one ends with exit code 1."""

    retained: float | None = Field(None, ge=0)
    """At least this part of the baseline's mean score is kept, judged by the lower end of the confidence interval."""
    cosine_mean: float | None = Field(None, ge=-1, le=1)
    """At least this mean cosine between variant and baseline vectors."""
    overlap_at_10: float | None = Field(None, ge=0, le=1)
    """At least this share of the ten nearest neighbours is the same."""
    speedup: float | None = Field(None, ge=0)
    """At least this throughput relative to the float32 baseline on a CPU, float16 on a GPU."""
    size_ratio: float | None = Field(None, ge=0)
    """At most this size relative to the half-precision baseline."""


class Recipe(Section):
    """How a model is made smaller and how the result is measured."""

    name: str = "recipe"
    """Of a recipe in a file by default the file's."""
    description: str = ""
    """When to use it, in a line."""
    model: str = "nano"
    """A built-in name, a folder or a hub name; `--model` overrides it."""
    runtime: RuntimeChoice = TORCH
    """What executes the variant: `torch`; `onnxruntime` and `openvino`, on a CPU and without torch; `auto`: the fastest that is
    installed and executes the numbers that the steps make."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Of the variant's floating-point arithmetic; left out: float32 on a CPU, float16 on a GPU."""
    seed: int = 0
    """Seed of everything that is sampled."""
    fold: bool = True
    """Whether a model with NV-Embed's latent-attention head has it folded before the steps, which loses nothing."""
    steps: tuple[SerializeAsAny[Method], ...] = ()
    """Methods, in the order of their application."""
    calibration: Calibration = Calibration()
    evaluate: Evaluate = Evaluate()
    measure: Measure = Measure()
    gates: Gates = Gates()
    export: tuple[ExportChoice, ...] = ("variant",)
    """What the run's folder keeps besides the record: `variant`, the model that was measured, and beside it the same weights in
    layouts that other libraries load, each in a folder of its name. Empty: the record alone."""

    @field_validator("steps")
    @classmethod
    def _whole_model_first(cls, steps: tuple[Method, ...]) -> tuple[Method, ...]:
        for number, (before, step) in enumerate(pairwise(steps), start=1):
            if step.whole and not before.whole and not step.anywhere:
                raise ValueError(f"steps.{number} ({step.method}) changes the model as a whole; put it before {before.method}")
        if sum(step.method == "width" for step in steps) > 1:
            raise ValueError("width can be there once; give it both `heads` and `channels`")
        return steps


def steps_for(recipe: Recipe, shape: ModelShape) -> tuple[Method, ...]:
    """Return the steps that a recipe takes on a model: its own, and the exact fold where that applies and is not among them.

    The fold comes before the first step that goes segment by segment.
    """
    fold = method_class("fold")(method="fold")
    whole = len(list(takewhile(lambda step: step.whole, recipe.steps)))
    for step in recipe.steps[:whole]:
        if step.fits(shape):  # one that does not is refused where the recipe is planned, with the reason
            shape = step.estimate(shape).after
    if not recipe.fold or any(step.method == "fold" for step in recipe.steps) or not fold.fits(shape):
        return recipe.steps
    return (*recipe.steps[:whole], fold, *recipe.steps[whole:])
