"""What a recipe would do to a model: sizes, memory, time, and what does not fit. Loads no weights and does not import torch."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from compress.calibration.texts import BATCH_TOKENS as CALIBRATION_BATCH_TOKENS
from compress.common.card import read_card
from compress.common.errors import UserError
from compress.common.memory import available_memory_bytes, gigabytes
from compress.layers.scheme import QuantizedLayer
from compress.methods import METHODS, method_class
from compress.methods.base import Estimate
from compress.models.architectures import one_set_of_blocks
from compress.models.shape import ModelShape
from compress.pipeline.gpu_rates import rate_for, read_rates
from compress.pipeline.recipe import Recipe, placed_steps
from compress.runtimes.contract import CPU_BATCH_TOKENS, Kind, pick_runtime, usual_device

# Basis of the time estimates. They are rough, and the printed plan says so.
MEMORY_BYTES_PER_SECOND = 2e9  # elementwise passes over weights, and reading files
DISK_BYTES_PER_SECOND = 2.5e8  # writing with fsync
EMBEDDED_TASK_TOKENS = 45_000  # the embedded suite, once
PROCESS_SECONDS = 8  # start of a measuring process
LONGEST_TEXT = 8_192  # tokens, where a config gives no number of positions
TYPICAL_LENGTH = 64  # tokens of a text that speed is measured on
# Memory of compiled kernels and of the threads' buffers.
RUNTIME_BYTES = 96e6
# Freed blocks that the allocator keeps were measured to be as large as the arrays that are live at the same time.
ALLOCATOR_FACTOR = 2


@dataclass(frozen=True)
class Plan:
    """What a recipe would do to a model."""

    model: str
    parameters: int
    steps: tuple[str, ...]
    half_bytes: int
    variant_bytes: int
    apply_memory_bytes: int
    """Peak memory while compressing: one segment of the model, what a step adds, and the runtime's own."""
    run_memory_bytes: int
    """Peak anonymous memory, above the imports, while the variant encodes: stored weights, activations, the runtime's own."""
    apply_seconds: float
    evaluate_seconds: float | None
    """None if the sizes of the tasks are not known before they are read."""
    measure_seconds: float
    runtime: str
    """Runtime that would execute the variant."""
    quantized: Mapping[str, QuantizedLayer]
    """How layers and embedding tables would be stored, by name."""
    widths: Mapping[str, int]
    """Number of inputs of each linear layer that would be quantized, by name."""
    gpus: Mapping[str, str]
    """Memory and time of a step on one or several GPUs, by its method and, where it is done in rounds, the round."""
    static: bool
    """Whether the variant would be a static table."""
    problems: tuple[str, ...]
    """What does not fit, one sentence each."""


def make_plan(recipe: Recipe, shape: ModelShape, output: Path) -> Plan:
    """Plan a recipe for a model's shape.

    Raises:
        UserError: a step does not fit the model, for example because a pattern matches none of its layers; or no variant can be
            made of it.
    """
    shared = one_set_of_blocks(shape.config)
    if shared is not None:
        raise UserError(f"{shape.name}: cannot be compressed block by block: {shared}", "compress.load runs the model as it is")
    after, step_memory, touched, operations, notes = shape.as_stored(), 0, 0, 0.0, []
    quantized: dict[str, QuantizedLayer] = {}
    gpus: dict[str, str] = {}
    calibration_tokens = recipe.calibration.count * TYPICAL_LENGTH
    if not shape.parameters:
        raise UserError(
            f"model {shape.name!r}: its table is stored in integers already", "start from the model that it was made from"
        )
    for where, step in placed_steps(recipe, shape):
        place = f"recipe {recipe.name}: {where}"
        if not after.blocks and not step.without_blocks:
            raise UserError(
                f"{place} ({step.method}): {after.name} is a static table, which has no blocks",
                f"these steps work on it: {', '.join(name for name in METHODS if method_class(name).without_blocks)}",
            )
        try:
            estimate = step.estimate(after)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from error
        after = estimate.after
        step_memory = max(step_memory, estimate.memory_bytes)
        touched += estimate.bytes_touched
        operations += estimate.flops
        quantized |= estimate.quantized
        if estimate.passes:
            operations += estimate.passes * calibration_tokens * shape.flops_per_token(TYPICAL_LENGTH)
            held = int(4 * estimate.copies * calibration_tokens * shape.hidden_size)
            step_memory = max(step_memory, held + shape.activation_bytes(CALIBRATION_BATCH_TOKENS) + shape.largest_segment_bytes)
        if step.calibrates:
            # The texts pass each segment twice: to see its inputs, then to produce those of the next. A batch's activations and the
            # segment in float32 are in memory at the same time.
            operations += 2 * calibration_tokens * shape.flops_per_token(TYPICAL_LENGTH)
            running = shape.activation_bytes(CALIBRATION_BATCH_TOKENS) + shape.largest_segment_bytes
            step_memory = max(step_memory, estimate.memory_bytes + running)
        notes.append(f"{step.method}: {estimate.note}")
        _, _, of_round = where.partition(" ")  # the steps of the rounds have the same methods
        gpus |= {f"{step.method} {of_round}".strip(): _on_gpus(estimate)} if estimate.gpus else {}
    variant_bytes = after.file_bytes
    # A batch is at most all texts.
    longest = int(shape.setting("max_position_embeddings") or LONGEST_TEXT)
    batch_tokens = min(recipe.measure.batch_tokens or CPU_BATCH_TOKENS, recipe.measure.count * longest)
    activations = ALLOCATOR_FACTOR * shape.activation_bytes(batch_tokens) + int(RUNTIME_BYTES)
    rate = _float_operations_per_second()
    encode = shape.flops_per_token(TYPICAL_LENGTH) / rate
    texts_tokens = recipe.measure.count * TYPICAL_LENGTH
    mini_only = set(recipe.evaluate.tasks) <= {"mini"}
    plan = Plan(
        model=shape.name,
        parameters=shape.parameters,
        steps=tuple(notes),
        half_bytes=shape.half_bytes,
        variant_bytes=variant_bytes,
        apply_memory_bytes=shape.largest_segment_bytes + step_memory + int(RUNTIME_BYTES),
        run_memory_bytes=variant_bytes + activations,
        apply_seconds=(touched + shape.bytes) / MEMORY_BYTES_PER_SECOND + variant_bytes / DISK_BYTES_PER_SECOND + operations / rate,
        evaluate_seconds=2 * EMBEDDED_TASK_TOKENS * encode if mini_only else None,
        measure_seconds=3 * (PROCESS_SECONDS + (recipe.measure.rounds + 1) * texts_tokens * encode),
        runtime=recipe.runtime,
        quantized=quantized,
        widths={name: after.packed[name][1] for name in quantized if name in after.packed and name != after.token_table},
        gpus=gpus,
        static=not after.blocks,
        problems=(),
    )
    problems = _problems(plan, output)
    try:
        device, kind = usual_device(recipe.runtime), Kind(static=plan.static)
        runtime = pick_runtime(recipe.runtime, quantized, device=device, dtype=recipe.dtype, kind=kind, widths=plan.widths)
        plan = replace(plan, runtime=runtime)
    except UserError as error:
        problems.append(error.message)
    return replace(plan, problems=tuple(problems))


def _on_gpus(estimate: Estimate) -> str:
    card = read_card()
    rate, said = rate_for(None if card is None else card.name, read_rates())
    costs = (
        f"{count}: {gigabytes(each)}{' each' if count > 1 else ''}, {duration(operations / rate)}"
        for count, (each, operations) in estimate.gpus.items()
    )
    return f"{'; '.join(costs)} (rough; {said})"


def _problems(plan: Plan, output: Path) -> list[str]:
    problems = []
    memory = available_memory_bytes()
    for what, needed in (("compressing", plan.apply_memory_bytes), ("running the variant", plan.run_memory_bytes)):
        if needed > memory:
            problems.append(f"{what} needs {gigabytes(needed)} of memory, {gigabytes(memory)} are free")
    existing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if plan.variant_bytes > free:
        problems.append(f"the variant needs {gigabytes(plan.variant_bytes)} on disk, {gigabytes(free)} are free in {existing}")
    return problems


def _float_operations_per_second() -> float:
    """Time a small float32 product with numpy; accurate enough for a rough estimate."""
    a = np.ones((512, 512), dtype=np.float32)
    a @ a
    start = time.perf_counter()
    a @ a
    a @ a
    return 2 * 2 * 512**3 / max(time.perf_counter() - start, 1e-6)


def duration(seconds: float) -> str:
    """Format a time for people."""
    if seconds < 120:
        return f"{seconds:,.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def describe(plan: Plan) -> str:
    """Format a plan for people."""
    lines = [
        f"model     {plan.model}: {plan.parameters / 1e6:,.1f} M parameters",
        *(f"step      {note}" for note in plan.steps or ("none: the model is measured as it is",)),
        *(f"on GPUs   {method}: {costs}" for method, costs in plan.gpus.items()),
        f"runtime   {plan.runtime}",
        f"size      {gigabytes(plan.half_bytes)} in half precision -> {gigabytes(plan.variant_bytes)} "
        f"({plan.variant_bytes / plan.half_bytes:.2f}x, {8 * plan.variant_bytes / plan.parameters:.2f} bits a parameter)",
        f"memory    {gigabytes(plan.apply_memory_bytes)} while compressing, "
        f"{gigabytes(plan.run_memory_bytes)} while the variant runs",
        f"time      about {duration(plan.apply_seconds)} to compress, "
        + (f"{duration(plan.evaluate_seconds)} to evaluate, " if plan.evaluate_seconds is not None else "")
        + f"{duration(plan.measure_seconds)} to measure, on {os.cpu_count()} cores (rough)",
    ]
    if plan.evaluate_seconds is None:
        lines.append("          the time to evaluate depends on the size of the tasks, which a plan does not read")
    lines += [f"too big   {problem}" for problem in plan.problems] or ["fits      yes"]
    return "\n".join(lines)
