"""What a recipe may say, and how a wrong one is refused: with file, line, key and the nearest right name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, field_validator
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from compress.errors import UserError, nearest
from compress.methods import METHODS, method_class
from compress.methods.base import Method
from compress.models.shape import ModelShape

Fault = tuple[int, str]
"""A line, from 1 (0 where there is no file), and what is wrong there."""


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
    runtime: Literal["torch", "onnxruntime", "openvino", "auto"] = "torch"
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
    export: tuple[
        Literal[
            "variant", "transformers", "sentence-transformers", "nv-embed", "onnx", "openvino", "compressed-tensors", "gptq", "gguf"
        ],
        ...,
    ] = ("variant",)
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


def read_recipe(path: Path | str) -> Recipe:
    """Read a recipe file.

    Raises:
        UserError: the file is missing, is not YAML, or says what a recipe may not say; every fault is named with its line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        beside = [str(other) for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), beside) if beside else ""
        raise UserError(f"recipe {path}: cannot be read ({error.strerror})", hint) from error
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path}: not a text file ({error.reason} at byte {error.start})") from error
    try:
        data = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {' '.join(str(error.problem or error.context).split())}") from error
    except YAMLError as error:  # the reader's own (control characters) carry no mark
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise UserError(
            f"{path}: a recipe is a mapping of keys to values, this is a {type(data).__name__}", "see recipes/int8.yaml"
        )
    recipe = parse_recipe(data, str(path))
    return recipe if "name" in recipe.model_fields_set else recipe.model_copy(update={"name": path.stem})


def parse_recipe(data: Mapping[str, Any], place: str = "recipe") -> Recipe:
    """Check a recipe's content; `place` names it in errors.

    Raises:
        UserError: naming every fault.
    """
    plain = _plain(data)
    faults: list[Fault] = []
    steps: list[Method] = []
    raw_steps = plain.pop("steps", ())
    if not isinstance(raw_steps, tuple):
        faults.append(_fault(data, ("steps",), "must be a list of steps, each with a 'method'"))
        raw_steps = ()
    for index, raw in enumerate(raw_steps):
        step = _parse_step(raw, data, index, faults)
        if step is not None:
            steps.append(step)
    try:
        recipe = Recipe.model_validate({**plain, "steps": tuple(steps)})
    except ValidationError as error:
        faults += _describe(error, Recipe, data, ())
    if faults:
        lines = [f"{place}{f', line {line}' if line else ''}: {message}" for line, message in sorted(faults)]
        raise UserError(lines[0], "\n".join(lines[1:]))
    return recipe


def _parse_step(raw: Any, data: Any, index: int, faults: list[Fault]) -> Method | None:
    where = ("steps", index)
    if not isinstance(raw, dict) or "method" not in raw:
        faults.append(_fault(data, where, f"a step is a mapping with a 'method'; {nearest('', METHODS)}"))
        return None
    name = raw["method"]
    if not isinstance(name, str) or name not in METHODS:
        faults.append(_fault(data, (*where, "method"), f"unknown method {name!r}; {nearest(str(name), METHODS)}"))
        return None
    kind = method_class(name)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        faults += _describe(error, kind, data, where)
        return None


def _plain(value: Any) -> Any:
    """Turn the YAML reader's own containers and scalars into Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(item) for item in value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _describe(error: ValidationError, model: type[BaseModel], data: Any, prefix: tuple[str | int, ...]) -> list[Fault]:
    """Say each fault that pydantic found in a line of its own."""
    faults: list[Fault] = []
    for fault in error.errors():
        location = (*prefix, *fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = _fields_at(model, fault["loc"][:-1])
            message = f"unknown key {fault['loc'][-1]!r}; {nearest(str(fault['loc'][-1]), known)}"
        elif fault["type"] == "literal_error":
            options = [str(option) for option in _options_at(model, fault["loc"])]
            message = f"{fault['input']!r} is not allowed here; {nearest(str(fault['input']), options)}"
        else:
            said = fault["msg"].replace("valid tuple", "list").replace("valid dictionary or instance of", "mapping:")
            message = f"{said[0].lower()}{said[1:]}, got {fault['input']!r}"
        faults.append(_fault(data, location, message))
    return faults


def _fault(data: Any, location: Sequence[str | int], message: str) -> Fault:
    return _line(data, location), f"{'.'.join(str(part) for part in location)}: {message}"


def _line(data: Any, location: Sequence[str | int]) -> int:
    """Return the line, from 1, of the deepest part of `location` that the file has; 0 for a recipe that is not from a file."""
    line = 0
    for part in location:
        marks = getattr(data, "lc", None)
        if marks is None or marks.data is None or (part not in data if isinstance(data, Mapping) else not isinstance(part, int)):
            break
        position = marks.key(part) if isinstance(data, Mapping) else marks.item(part)
        line = position[0] + 1
        data = data[part]
    return line


def _model_at(model: type[BaseModel], location: Sequence[str | int]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            break
        model = field.annotation
    return model


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    return list(_model_at(model, location).model_fields)


def _options_at(model: type[BaseModel], location: Sequence[str | int]) -> list[Any]:
    """Return the values that a Literal field allows, looking through tuples."""
    names = [part for part in location if isinstance(part, str)]
    field: FieldInfo | None = _model_at(model, names[:-1]).model_fields.get(names[-1])
    annotation: Any = field.annotation if field else None
    while get_args(annotation) and isinstance(get_args(annotation)[0], type(Literal["x"])):
        annotation = get_args(annotation)[0]
    return list(get_args(annotation))


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, every method's keys included, so that editors complete and check them."""
    described = Recipe.model_json_schema()
    definitions = described.setdefault("$defs", {})
    definitions.pop("Method", None)
    references = []
    for name in METHODS:
        definition = method_class(name).model_json_schema()
        definitions |= definition.pop("$defs", {})
        definition["required"] = ["method"]  # it has a default, which only Python callers may rely on
        definitions[name] = definition
        references.append({"$ref": f"#/$defs/{name}"})
    described["properties"]["steps"]["items"] = {"oneOf": references}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}
