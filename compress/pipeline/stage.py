"""One stage of making a variant: a single walk over the model's segments that applies its steps and writes the result."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.calibration.inputs import Inputs
from compress.calibration.originals import Originals
from compress.calibration.sensitivity import Survey
from compress.calibration.texts import CalibrationSource, CalibrationTexts
from compress.common.errors import UserError
from compress.common.files import replacing, sync_folder, sync_tree, write_text_atomic
from compress.common.journal import Journal
from compress.common.ranks import Leader
from compress.layers.compressed import CompressedLayer
from compress.layers.float_layers import has_onednn_linear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Method
from compress.models.files.shards import join_shards, shard, sparse, write_tensors
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.network.segments import Kind, Parts, Segment, replace_module, segments_of
from compress.models.network.walk import Carry, Streamed, walk
from compress.models.opened import OpenModel, buffers_to, open_model
from compress.models.shape import ModelShape
from compress.runtimes.contract import GRAPH_RUNTIMES

WRITTEN = "written"
"""Journal key of what a stage returned; it is written before the variant gets its final name."""


@dataclass(frozen=True)
class BuildOptions:
    """How a variant is built: everything but the model, the steps and the place; the same for all stages."""

    fingerprint: str
    """Fingerprint of the files of the model that the recipe starts from."""
    say: Callable[[str], None]
    """Called with a line of progress."""
    calibration: CalibrationSource | None = None
    """Texts for the steps that calibrate. Each step sees a segment's inputs as the compressed segments before it produce them."""
    device: str = "cpu"
    """Device on which the segments are worked on."""
    runtime: str = "torch"
    """Runtime that the variant is made for."""
    dtype: str | None = None
    """Dtype of the runtime's floating-point arithmetic; None: the runtime's default."""
    evaluated: Callable[[], frozenset[str]] = frozenset
    """Returns the texts that nothing may be trained on; see `Bench.evaluated`."""
    ranks: Leader | None = None
    """The other ranks, where the run was started with several."""


@dataclass(frozen=True)
class Stage:
    """Steps that share one walk over the model, what the walk reads and what it writes."""

    source: ModelFolder
    """The model, or the variant that the previous stage wrote."""
    shape: ModelShape
    """Shape of `source`."""
    steps: Sequence[Method]
    earlier_steps: int
    """Number of steps in the stages before this one; errors count from the recipe's first step."""
    target: Path
    """Folder of the variant; it appears once the variant is complete."""
    journal: Journal
    published: ModelFolder
    """Folder of the model that the recipe starts from."""
    options: BuildOptions

    def failed(self, number: int, step: Method, error: ValueError) -> UserError:
        """Return the error of a step that does not fit the model; `number` counts from the stage's first step."""
        return UserError(f"steps.{self.earlier_steps + number} ({step.method}): {error}")


def write_stage(stage: Stage) -> list[dict[str, Any]]:
    """Apply a stage's steps and write the variant.

    Returns:
        What `make_variant` returns, for the steps of this stage.

    Raises:
        UserError: a step does not fit the model, or a weight is not finite in float16.
    """
    if stage.journal.has(WRITTEN) and stage.target.exists():  # stopped after the rename, before the caller noted it
        written: list[dict[str, Any]] = stage.journal.get(WRITTEN)["steps"]
        return written
    decided = _decide(stage)
    folder = stage.target.with_name(f"{stage.target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)  # else a power cut could take the folder, and leave the journal that says what is in it
    segments = _walk(stage, decided, folder)
    done = _describe_steps(stage, decided, segments)
    _write_description(stage, decided, segments, done, folder)
    sync_tree(folder)
    stage.journal.put(WRITTEN, {"steps": done})
    shutil.rmtree(stage.target, ignore_errors=True)
    folder.rename(stage.target)
    sync_folder(stage.target.parent)
    return done


@dataclass(frozen=True)
class _Decided:
    """The open model and its steps, after every decision that needs the model as a whole."""

    steps: Sequence[Method]
    model: OpenModel
    place: torch.device
    compute: torch.dtype
    """Dtype in which the calibration texts are run."""
    earlier: VariantInfo | None
    """Description of the source, where that is a variant."""
    reports: dict[int, dict[str, Any]]
    """What steps reported for the record, by number."""

    @property
    def stored(self) -> dict[str, QuantizedLayer]:
        """Layers that earlier stages quantized, by name."""
        return dict(self.earlier.quantized) if self.earlier else {}


def _decide(stage: Stage) -> _Decided:
    """Open the model and let every step decide what depends on the model as a whole; see `Method.prepare`."""
    options, journal, source = stage.options, stage.journal, stage.source
    model, place = open_model(source), torch.device(options.device)
    buffers_to(model.network, place)
    exact = any(step.float32 for step in stage.steps)
    compute = torch.float32 if exact else compute_dtype(model.weights.dtypes(), place)
    reports: dict[int, dict[str, Any]] = {}

    def calibration_texts(now: OpenModel) -> CalibrationTexts:
        assert options.calibration is not None, "a step surveys the calibration texts"
        return options.calibration.batches(now.tokenizer, now.spec)

    steps: list[Method] = []
    for number, step in enumerate(stage.steps):
        survey = Survey(model, partial(calibration_texts, model), place, compute)
        once, report = partial(_timed, journal, number), partial(reports.__setitem__, number)
        own = journal.folder / _decision(number)
        bench = Bench(once, own, stage.published, options.say, options.evaluated, report, options.ranks)
        try:
            step, model = step.prepare(model, survey, bench)
        except ValueError as error:
            raise stage.failed(number, step, error) from error
        steps.append(step)
    earlier = source.variant
    return _Decided(steps, model, place, compute, earlier, reports)


def _walk(stage: Stage, decided: _Decided, folder: Path) -> list[dict[str, Any]]:
    """Walk the segments that the journal does not have yet, then join their files; return the journal's entry of each segment."""
    network = decided.model.network
    count = len(segments_of(network))
    writer = _SegmentWriter(stage, decided, folder, count)
    first = next((index for index in range(count) if not stage.journal.has(_entry(index))), count)
    if first < count:
        walk(Streamed(network, decided.model.weights), writer.visit, writer.carry, start=first)
    entries = [stage.journal.get(_entry(index)) for index in range(count)]
    join_shards(folder, count)
    return entries


@dataclass
class _SegmentWriter:
    """Applies a stage's steps to one segment after another, and writes each as a shard."""

    stage: Stage
    decided: _Decided
    folder: Path
    count: int
    """Number of segments."""
    texts: CalibrationTexts | None = field(init=False, default=None)
    carry: Carry | None = field(init=False, default=None)
    """Hidden states of the calibration texts, where a step calibrates."""
    originals: Originals | None = field(init=False, default=None)
    """The texts in the unchanged model, where a step compares with it."""

    def __post_init__(self) -> None:
        if any(step.calibrates for step in self.decided.steps):
            options, model = self.stage.options, self.decided.model
            assert options.calibration is not None, "a step calibrates"
            self.texts = options.calibration.batches(model.tokenizer, model.spec)
            self.carry = Carry(self.texts.batches, self.decided.place, self.stage.journal.folder / "texts")
            if any(step.compares for step in self.decided.steps):
                other = Carry(self.texts.batches, self.decided.place, self.stage.journal.folder / "original-texts")
                self.originals = Originals(model.network, self.texts, self._load, other)
            options.say(f"calibrating on {len(options.calibration.texts)} texts, {self.texts.tokens:,} tokens")

    def visit(self, index: int, segment: Segment, parts: Parts) -> None:
        """Compress and write a segment, then leave it in the form in which the calibration texts pass it."""
        for module in parts.values():
            module.to(self.decided.place)
        inputs = None
        if self.carry is not None and self.texts is not None:
            cast(parts, self.decided.compute)
            original = self.originals.at(index) if self.originals is not None and segment.kind is Kind.BLOCK else None
            seen = segment.kind in (Kind.BLOCK, Kind.HEAD)
            inputs = Inputs(self.carry, self.texts, index, segment, original) if seen else None
        quantized, seconds = self._apply(parts, inputs)
        tensors = _stored(parts, self.decided.stored | quantized, self.stage.source.name)
        dense = self.stage.options.runtime in GRAPH_RUNTIMES
        write_tensors(shard(self.folder, index, self.count), tensors if dense else sparse(tensors))
        described = {name: layer.model_dump(mode="json") for name, layer in quantized.items()}
        self.stage.journal.put(_entry(index), {"segment": segment.name, "quantized": described, "seconds": seconds})
        if self.carry is not None:
            prepare_to_run(parts, self.decided.compute)

    def _load(self, segment: Segment) -> Parts:
        """Return a segment as the walk finds it, ready to run."""
        parts = Streamed(self.decided.model.network, self.decided.model.weights).load(segment)
        for module in parts.values():
            module.to(self.decided.place)
        cast(parts, self.decided.compute)
        return parts

    def _apply(self, parts: Parts, inputs: Inputs | None) -> tuple[dict[str, QuantizedLayer], list[float]]:
        """Apply every step to a segment; return the layers they quantized, and the seconds that each step took."""
        quantized: dict[str, QuantizedLayer] = {}
        seconds = []
        for number, step in enumerate(self.decided.steps):
            start = time.perf_counter()
            try:
                quantized |= step.apply(parts, inputs)
            except ValueError as error:
                raise self.stage.failed(number, step, error) from error
            seconds.append(time.perf_counter() - start)
        return quantized, seconds


def _describe_steps(stage: Stage, decided: _Decided, segments: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what the record says of each step; `segments` are the journal's entries."""
    done, shape = [], stage.shape
    for number, step in enumerate(decided.steps):
        estimate = step.estimate(shape)
        note, shape = estimate.note, estimate.after
        deciding = stage.journal.get(_decision(number))["seconds"] if stage.journal.has(_decision(number)) else 0.0
        seconds = deciding + sum(entry["seconds"][number] for entry in segments)
        found = decided.reports.get(number, {})
        done.append({"config": step.model_dump(mode="json"), "seconds": seconds, "note": note, "found": found})
        stage.options.say(f"{step.method}: {note} ({seconds:.1f} s)")
    return done


def _write_description(
    stage: Stage, decided: _Decided, segments: Sequence[Mapping[str, Any]], done: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Write the files of a variant other than its weights: config, tokenizer, `variant.json`."""
    source, options, model, earlier = stage.source, stage.options, decided.model, decided.earlier
    quantized = {name: QuantizedLayer(**layer) for entry in segments for name, layer in entry["quantized"].items()}
    info = VariantInfo(
        base=source.name,
        base_fingerprint=options.fingerprint,
        licence=source.licence,
        max_length=model.tokenizer.max_length,
        spec=model.spec,
        pretrained=not source.is_random,
        folded=any(step.method == "fold" for step in decided.steps) or (earlier is not None and earlier.folded),
        runtime=options.runtime,
        dtype=options.dtype,
        layers=model.layers,
        heads=model.heads,
        blocks=model.blocks,
        dropped=model.dropped,
        quantized=decided.stored | quantized,
        aligned_to=model.aligned_to,
        depths=model.depths,
        steps=[*(earlier.steps if earlier else []), *(step["config"] for step in done)],
    )
    write_text_atomic(folder / "config.json", json.dumps(model.config, indent=2, ensure_ascii=False) + "\n")
    with replacing(folder / "tokenizer.json") as temporary:
        model.tokenizer.save(temporary)
    info.write(folder)


def _timed(journal: Journal, number: int, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return a step's decision, made once and kept by the journal with the seconds that it took."""

    def make() -> dict[str, Any]:
        start = time.perf_counter()
        decision = decide()
        return {"decision": decision, "seconds": time.perf_counter() - start}

    decision: dict[str, Any] = journal.once(_decision(number), make)["decision"]
    return decision


def _decision(number: int) -> str:
    return f"step-{number}"


def _entry(index: int) -> str:
    return f"segment {index}"


def compute_dtype(stored: set[torch.dtype], device: torch.device) -> torch.dtype:
    """Return the dtype to calibrate in: the weights' own half precision where the device multiplies it fast, else float32."""
    if len(stored) != 1:
        return torch.float32
    (dtype,) = stored
    fast = device.type != "cpu" or (dtype is torch.bfloat16 and has_onednn_linear(dtype))
    return dtype if fast and dtype in (torch.float16, torch.bfloat16) else torch.float32


def cast(parts: Parts, dtype: torch.dtype) -> None:
    """Cast a segment to the dtype that calibration computes in. No value changes: float32 holds those of either half precision."""
    for module in parts.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)


def prepare_to_run(parts: Parts, dtype: torch.dtype) -> None:
    """Bring a compressed segment into the form that runs fastest when all calibration batches pass it one after another."""
    for path, part in list(parts.items()):
        for inner, module in list(part.named_modules()):
            if isinstance(module, QuantizedEmbedding):
                module.dtype = dtype
            elif isinstance(module, CompressedLayer):
                replace_module(parts, f"{path}.{inner}" if inner else path, module.held(dtype))


def _stored(parts: Mapping[str, Any], quantized: Mapping[str, QuantizedLayer], name: str) -> dict[str, torch.Tensor]:
    """Return a segment's tensors as a variant stores them: float16, except those of quantized layers (but not their biases)."""
    tensors = {f"{path}.{key}": tensor for path, part in parts.items() for key, tensor in part.state_dict().items()}
    for key, tensor in tensors.items():
        own = key.rpartition(".")[0] in quantized and not key.endswith(".bias")
        if tensor.is_floating_point() and not own:
            tensors[key] = tensor.to(torch.float16)
            if not torch.isfinite(tensors[key]).all():
                raise UserError(f"{name}: {key} is not finite in float16; the variant was not written")
    return tensors
