"""One walk over a model's segments: applies the steps that share it and writes the variant."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.calibration.texts import CalibrationSource
from compress.common.errors import UserError
from compress.common.files import write_text_atomic
from compress.common.journal import Journal
from compress.layers.scheme import QuantizedLayer
from compress.methods.base import Bench, Method
from compress.models.files.variant import VariantInfo
from compress.models.folder import ModelFolder
from compress.models.shape import ModelShape
from compress.runtimes.contract import GRAPH_RUNTIMES

if TYPE_CHECKING:
    import torch

    from compress.calibration.sensitivity import Survey
    from compress.calibration.texts import CalibrationTexts
    from compress.models.network.segments import Parts, Segment
    from compress.models.opened import OpenModel

WRITTEN = "written"
"""Where the journal of a walk keeps what it returned, from before the variant has its name."""


@dataclass(frozen=True)
class Making:
    """What all stages of a variant's making have in common; see `make_variant`."""

    published: ModelFolder
    fingerprint: str
    say: Callable[[str], None]
    calibration: CalibrationSource | None
    device: str
    runtime: str
    dtype: str | None
    evaluated: Callable[[], frozenset[str]]


def write_stage(
    making: Making, source: ModelFolder, shape: ModelShape, steps: Sequence[Method], before: int, target: Path, journal: Journal
) -> list[dict[str, Any]]:
    """Apply steps that share one walk, of which there were `before` others, to a model or to the variant of those."""
    if journal.has(WRITTEN) and target.exists():  # killed behind the renaming, before anyone noted it
        written: list[dict[str, Any]] = journal.get(WRITTEN)["steps"]
        return written
    import torch

    from compress.calibration.inputs import Inputs
    from compress.calibration.sensitivity import Survey
    from compress.models.files.shards import join_shards, shard, sparse, write_tensors
    from compress.models.network.segments import Kind, segments_of
    from compress.models.network.walk import Carry, Streamed, walk
    from compress.models.opened import buffers_to, open_model

    model, place = open_model(source), torch.device(making.device)
    buffers_to(model.network, place)
    compute = _compute_dtype(model.weights.dtypes(), place)

    def survey(now: OpenModel) -> Survey:
        def batches() -> CalibrationTexts:
            assert making.calibration is not None, "a step surveys the calibration texts"
            return making.calibration.batches(now.tokenizer, now.spec)

        return Survey(now, batches, place, compute)

    reports: dict[int, dict[str, Any]] = {}

    def bench(number: int) -> Bench:
        once, report = partial(_timed, journal, number), partial(reports.__setitem__, number)
        return Bench(once, journal.folder / _decision(number), making.published, making.say, making.evaluated, report)

    steps, model = _prepared(steps, model, survey, bench, before)
    earlier = source.variant
    stored = dict(earlier.quantized) if earlier else {}
    network, tokenizer = model.network, model.tokenizer
    count = len(segments_of(network))
    folder = target.with_name(f"{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    texts = carry = None
    if any(step.calibrates for step in steps):
        assert making.calibration is not None, "a step calibrates"
        texts = making.calibration.batches(tokenizer, model.spec)
        carry = Carry(texts.batches, place, journal.folder / "texts")
        making.say(f"calibrating on {len(making.calibration.texts)} texts, {texts.tokens:,} tokens")

    def visit(index: int, segment: Segment, parts: Parts) -> None:
        quantized: dict[str, QuantizedLayer] = {}
        seconds = []
        inputs = None
        for module in parts.values():
            module.to(place)
        if carry is not None and texts is not None:
            _cast(parts, compute)
            inputs = Inputs(carry, texts, index, segment) if segment.kind in (Kind.BLOCK, Kind.HEAD) else None
        for number, step in enumerate(steps):
            start = time.perf_counter()
            try:
                quantized |= step.apply(parts, inputs)
            except ValueError as error:
                raise UserError(f"steps.{before + number} ({step.method}): {error}") from error
            seconds.append(time.perf_counter() - start)
        tensors = _stored(parts, stored | quantized, source.name)
        write_tensors(shard(folder, index, count), tensors if making.runtime in GRAPH_RUNTIMES else sparse(tensors))
        described = {name: layer.model_dump(mode="json") for name, layer in quantized.items()}
        journal.put(_entry(index), {"segment": segment.name, "quantized": described, "seconds": seconds})
        if carry is not None:
            _prepare_to_run(parts, compute)

    first = next((index for index in range(count) if not journal.has(_entry(index))), count)
    if first < count:
        walk(Streamed(network, model.weights), visit, carry, start=first)
    entries = [journal.get(_entry(index)) for index in range(count)]
    join_shards(folder, count)

    done = []
    for number, step in enumerate(steps):
        estimate = step.estimate(shape)
        note, shape = estimate.note, estimate.after
        decided = journal.get(_decision(number))["seconds"] if journal.has(_decision(number)) else 0.0
        seconds = decided + sum(entry["seconds"][number] for entry in entries)
        done.append({"config": step.model_dump(mode="json"), "seconds": seconds, "note": note, "found": reports.get(number, {})})
        making.say(f"{step.method}: {note} ({done[-1]['seconds']:.1f} s)")
    info = VariantInfo(
        base=source.name,
        base_fingerprint=making.fingerprint,
        licence=source.licence,
        max_length=tokenizer.max_length,
        spec=model.spec,
        pretrained=not source.is_random,
        folded=any(step.method == "fold" for step in steps) or (earlier is not None and earlier.folded),
        runtime=making.runtime,
        dtype=making.dtype,
        layers=model.layers,
        heads=model.heads,
        dropped=model.dropped,
        quantized=stored | {name: QuantizedLayer(**layer) for entry in entries for name, layer in entry["quantized"].items()},
        steps=[*(earlier.steps if earlier else []), *(step["config"] for step in done)],
    )
    write_text_atomic(folder / "config.json", json.dumps(model.config, indent=2, ensure_ascii=False) + "\n")
    tokenizer.save(folder / "tokenizer.json")
    info.write(folder)
    journal.put(WRITTEN, {"steps": done})
    shutil.rmtree(target, ignore_errors=True)
    folder.rename(target)
    return done


def _prepared(
    steps: Sequence[Method], model: OpenModel, survey: Callable[[OpenModel], Survey], bench: Callable[[int], Bench], before: int
) -> tuple[Sequence[Method], OpenModel]:
    """Let every step decide what depends on the model as a whole; see `Method.prepare`. `bench`: of a step, by its number."""
    decided: list[Method] = []
    for number, step in enumerate(steps):
        try:
            step, model = step.prepare(model, survey(model), bench(number))
        except ValueError as error:
            raise UserError(f"steps.{before + number} ({step.method}): {error}") from error
        decided.append(step)
    return decided, model


def _timed(journal: Journal, number: int, decide: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Keep what a step decided, and how long that took."""

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


def _compute_dtype(stored: set[torch.dtype], device: torch.device) -> torch.dtype:
    """Return what calibration computes in: the weights' own half precision where the device multiplies it, else float32."""
    import torch

    from compress.layers.float_layers import has_onednn_linear

    if len(stored) != 1:
        return torch.float32
    (dtype,) = stored
    fast = device.type != "cpu" or (dtype is torch.bfloat16 and has_onednn_linear(dtype))
    return dtype if fast and dtype in (torch.float16, torch.bfloat16) else torch.float32


def _cast(parts: Parts, dtype: torch.dtype) -> None:
    """Bring a segment into the dtype that calibration computes in; its weights keep their values, float32 holding any of them."""
    for module in parts.values():
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)


def _prepare_to_run(parts: Parts, dtype: torch.dtype) -> None:
    """Bring a compressed segment into the form in which the calibration texts pass it, all batches one after another."""
    from compress.layers.compressed import CompressedLayer
    from compress.layers.quantized_embedding import QuantizedEmbedding
    from compress.models.network.segments import replace_module

    for path, part in list(parts.items()):
        for inner, module in list(part.named_modules()):
            if isinstance(module, QuantizedEmbedding):
                module.dtype = dtype
            elif isinstance(module, CompressedLayer):
                replace_module(parts, f"{path}.{inner}" if inner else path, module.held(dtype))


def _stored(parts: Mapping[str, Any], quantized: Mapping[str, QuantizedLayer], name: str) -> dict[str, torch.Tensor]:
    """Return a segment's tensors as a variant keeps them: half precision, but for those of quantized layers, biases excepted."""
    import torch

    tensors = {f"{path}.{key}": tensor for path, part in parts.items() for key, tensor in part.state_dict().items()}
    for key, tensor in tensors.items():
        own = key.rpartition(".")[0] in quantized and not key.endswith(".bias")
        if tensor.is_floating_point() and not own:
            tensors[key] = tensor.to(torch.float16)
            if not torch.isfinite(tensors[key]).all():
                raise UserError(f"{name}: {key} is not finite in float16; the variant was not written")
    return tensors
