"""The sections and keys of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from compress.common.errors import UserError
from compress.export import FORMATS
from compress.methods import method_class
from compress.methods.base import Method
from compress.models.shape import ModelShape
from compress.pipeline.rounds import Rounds
from compress.runtimes.contract import AUTO, RUNTIMES, TORCH

if TYPE_CHECKING:
    RuntimeChoice = str
    ExportChoice = str
else:  # the tables' names, so that a row there is all that a new runtime or format takes
    RuntimeChoice = Literal[(*reversed(RUNTIMES), AUTO)]
    ExportChoice = Literal[("variant", *FORMATS)]


LONGEST_NAME = 100


WORDS = ("name", "description", "take_when", "not_when")
"""Keys of a recipe that say something of it and decide nothing."""


class Section(BaseModel):
    """A section of a recipe. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Evaluate(Section):
    """Tasks that measure accuracy. Without tasks, accuracy is not measured."""

    tasks: tuple[str, ...] = ("mini",)
    """Task names of the mteb package, `mini`: the embedded suite, which needs neither a network nor data files, or folders with
    tasks of your own (`./my-task`), relative to the recipe."""
    prompts: dict[str, str] = {}
    """Prompts that replace the model's own, written exactly as they go before the texts. Keys are a task (`STSBenchmark`), a task
    and role (`SciFact-query`, `SciFact-document`), a type of task (`Classification`) or a role (`query`)."""
    data: str | None = None
    """Folder with the tasks' data, laid out as `<task>[/<subset>]/<split>.jsonl[.gz]`. Left out, the data comes from the hub."""
    rotation: bool = False
    """Whether retrieval across the two models is also scored after a rotation between their vector spaces, fitted on the embedded
    calibration texts."""
    margin: float = Field(0.01, ge=0, lt=1)
    """Accepted loss on each task and on the mean, as a share of the baseline's score. Verdicts are judged against it."""
    baseline: Literal["auto", "float16", "float32"] = "auto"
    """Precision of the baseline's vectors. `auto` takes float16; on a CPU, where float16 is about ten times slower, it takes
    float32 if both agree to 1e-4 on a sample of texts."""


class Calibration(Section):
    """Texts for methods that calibrate. They must not be texts that the model is evaluated on."""

    texts: str = "embedded"
    """JSONL file with a `text` key (`.gz` allowed), plain text file with one text per line, or `embedded`: 512 texts of many kinds
    that come with the project."""
    count: int = Field(512, ge=1, le=10**6)
    """Number of texts to use, drawn with the recipe's seed."""
    max_tokens: int = Field(512, ge=8)
    """Length at which texts are cut, in tokens, prompt included."""
    prompts: Literal["model"] | tuple[str, ...] = "model"
    """Prompts that are put before the texts in turn. `model` takes each of the model's own prompts, or none if it has none."""


class Measure(Section):
    """What is measured in addition to accuracy, and on which texts."""

    what: tuple[Literal["fidelity", "speed"], ...] = ("fidelity", "speed")
    """What to measure. `fidelity`: how close the vectors are to the baseline's; `speed`: throughput, latency and memory; empty:
    neither."""
    texts: str = "mini"
    """Texts for speed, memory and fidelity: a JSONL file with a `text` key (`.gz` allowed), a plain text file with one text per
    line, or `mini`: texts of mixed lengths made from the embedded suite."""
    count: int = Field(256, ge=8, le=10**6)
    """Number of texts that each round of the throughput measurement encodes."""
    rounds: int = Field(5, ge=1)
    """Number of rounds. Baselines and variant take turns within each round; medians are reported."""
    requests: int = Field(100, ge=10)
    """Number of texts that are encoded one at a time for latency."""
    batches: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Batch sizes to time."""
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Text lengths, in tokens, to time. Every batch size is timed at every length; empty: none."""
    batch_tokens: int | None = Field(None, ge=1)
    """Padded tokens that a batch may hold. Defaults to what suits the device."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of each measured process. Defaults to all cores."""

    @model_validator(mode="after")
    def _cells_have_two_sides(self) -> Self:
        if bool(self.batches) != bool(self.lengths):
            given, lacking = ("batches", "lengths") if self.batches else ("lengths", "batches")
            raise ValueError(f"`{given}` has no effect without `{lacking}`: every batch size is timed at every length")
        return self


class Gates(Section):
    """Bounds that the run must keep. A run that misses one ends with exit code 1."""

    retained: float | None = Field(None, ge=0, le=1)
    """Least share of the baseline's mean score that must be kept (0.98 for 98 %), judged by the lower end of the confidence
    interval."""
    cosine_mean: float | None = Field(None, ge=-1, le=1)
    """Least mean cosine between the variant's and the baseline's vectors."""
    overlap_at_10: float | None = Field(None, ge=0, le=1)
    """Least share of a text's ten nearest neighbours that must be the same."""
    speedup: float | None = Field(None, ge=0)
    """Least throughput relative to the baseline: float32 on a CPU, float16 on a GPU."""
    size_ratio: float | None = Field(None, ge=0, le=4)
    """Largest size relative to the baseline in half precision (0.5 for half its size)."""


class Recipe(Section):
    """How a model is made smaller and how the result is measured."""

    name: str = "recipe"
    """Name of the recipe; runs are named after it. Defaults to the file name."""
    description: str = ""
    """What the recipe does, in one line."""
    take_when: str = ""
    """When to take the recipe: the end of a sentence that begins with `Take it when`, without its full stop."""
    not_when: str = ""
    """When not to take the recipe: the end of a sentence that begins with `Not when`, without its full stop."""
    model: str = "nano"
    """Model to compress: a built-in name, a folder or a hub name. `--model` overrides it."""
    runtime: RuntimeChoice = TORCH
    """Runtime that executes the variant: `torch`, `onnxruntime` or `openvino` (the last two on a CPU, without torch), `gptq`
    (GPTQModel's kernels, on a CUDA card), `numpy` (static tables only), or `auto` for the fastest one that is installed and
    executes the numbers that the steps produce."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Dtype of the variant's floating-point arithmetic. Defaults to float32 on a CPU and float16 on a GPU."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed for everything that is sampled."""
    fold: bool = True
    """Whether the latent-attention head of an NV-Embed model is folded before the steps. Folding is exact."""
    steps: tuple[SerializeAsAny[Method] | Rounds, ...] = ()
    """Methods, in the order in which they are applied, and groups of them that are done in rounds."""
    calibration: Calibration = Calibration()
    evaluate: Evaluate = Evaluate()
    measure: Measure = Measure()
    gates: Gates = Gates()
    export: tuple[ExportChoice, ...] = ("variant",)
    """What the run's folder keeps in addition to the record: `variant` is the model that was measured; the others are the same
    weights in layouts that other libraries load, each in a folder of that name. Empty: only the record is kept."""

    @field_validator("name")
    @classmethod
    def _no_path(cls, name: str) -> str:
        fault = fault_of_name(name)
        if fault is not None:
            raise ValueError(fault)
        return name

    @field_validator("steps")
    @classmethod
    def _whole_model_first(cls, steps: tuple[Method | Rounds, ...]) -> tuple[Method | Rounds, ...]:
        placed = _placed(steps)
        for (_, before), (place, step) in pairwise(placed):
            if step.whole and not before.whole and not step.anywhere:
                raise ValueError(f"{place} ({step.method}) changes the model as a whole; put it before {before.method}")
        narrowed = False
        for _, step in placed:
            if step.method == "width" and narrowed:
                raise ValueError("width can be used once before the model changes as a whole; give it both `heads` and `channels`")
            narrowed = step.method == "width" or (narrowed and not step.whole)
        return steps

    @property
    def placed(self) -> list[tuple[str, Method]]:
        """The methods of all steps, in their order, each with its place; those that are done in rounds come once."""
        return _placed(self.steps)

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods of all steps, in their order; those that are done in rounds come once."""
        return tuple(step for _, step in self.placed)


def _placed(steps: Sequence[Method | Rounds]) -> list[tuple[str, Method]]:
    """Return the methods of steps, each with its place; those that are done in rounds come once."""
    placed: list[tuple[str, Method]] = []
    for number, step in enumerate(steps):
        if isinstance(step, Rounds):
            placed += [(f"steps.{number}.steps.{inner}", own) for inner, own in enumerate(step.steps)]
        else:
            placed.append((f"steps.{number}", step))
    return placed


def fault_of_name(name: str) -> str | None:
    """Return why a recipe's name cannot be part of a folder's; None where it can."""
    if not name.strip() or name.startswith("."):
        return "runs are folders and are named after it: a name is not empty and starts with no dot"
    wrong = next((letter for letter in name if letter in "/\\" or not letter.isprintable()), None)
    if wrong is not None:
        return f"runs are folders and are named after it: leave out {wrong!r}"
    if len(name.encode()) > LONGEST_NAME:
        return f"runs are folders and are named after it: {len(name.encode())} bytes, at most {LONGEST_NAME} fit"
    return None


def check_name(name: str) -> None:
    """Check a recipe's name that was not read from a file.

    Raises:
        UserError: it cannot be part of a folder's name.
    """
    fault = fault_of_name(name)
    if fault is not None:
        raise UserError(f"name: {fault}, got {name!r}")


def steps_for(recipe: Recipe, shape: ModelShape) -> tuple[Method, ...]:
    """Return the steps of a recipe on a given model; see `placed_steps`.

    Raises:
        UserError: steps that are done in rounds do not fit the model.
    """
    return tuple(step for _, step in placed_steps(recipe, shape))


def placed_steps(recipe: Recipe, shape: ModelShape) -> list[tuple[str, Method]]:
    """Return the steps of a recipe on a given model, each with its place in the recipe: its own, those of every round one after
    another, and the exact fold where that applies and is not one of them.

    The fold comes before the first step that works segment by segment.

    Raises:
        UserError: steps that are done in rounds do not fit the model.
    """
    fold = method_class("fold")(method="fold")
    placed = _expanded(recipe, shape)
    whole = len(list(takewhile(lambda one: one[1].whole, placed)))
    for _, step in placed[:whole]:
        shape = _after(step, shape)
    if not recipe.fold or any(step.method == "fold" for _, step in placed) or not fold.fits(shape):
        return placed
    return [*placed[:whole], ("fold", fold), *placed[whole:]]


def _expanded(recipe: Recipe, shape: ModelShape) -> list[tuple[str, Method]]:
    """Return the steps of a recipe with groups in rounds as ordinary steps, each with its place.

    Raises:
        UserError: a group does not fit the model; names the recipe and the place.
    """
    placed: list[tuple[str, Method]] = []
    groups = sum(isinstance(step, Rounds) for step in recipe.steps)
    for number, step in enumerate(recipe.steps):
        place, known = f"steps.{number}", len(placed)
        if isinstance(step, Rounds):
            try:
                placed += step.expanded(place, shape)
            except UserError as error:
                raise UserError(f"recipe {recipe.name}: {error.message}", error.hint) from error
            groups -= 1
        else:
            placed.append((place, step))
        for _, made in placed[known:] if groups else ():  # only a group needs to know what the steps before it leave
            shape = _after(made, shape)
    return placed


def _after(step: Method, shape: ModelShape) -> ModelShape:
    """Return the shape after a step; one that does not fit is refused where the recipe is planned, with the reason."""
    return step.estimate(shape).after if step.fits(shape) else shape
