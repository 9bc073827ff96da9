"""Milliseconds of each choice for each group of layers, measured shape by shape on this machine, in the runtime that is named."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import nn

from compress.common.errors import UserError
from compress.common.lazy import attribute
from compress.layers.float8_linear import Float8Linear
from compress.layers.grid import find_grid
from compress.layers.quantized_linear import QMAX, QuantizedLinear
from compress.layers.scheme import ActivationScheme, Numbers, QuantizedLayer
from compress.models.folder import ModelFolder
from compress.models.network.pooling import backbone_of
from compress.models.opened import empty_model
from compress.models.shape import ModelShape
from compress.runtimes.contract import CPU_BATCH_TOKENS, GRAPH_RUNTIMES, RUNTIMES, TORCH, graph_inputs, pick_runtime
from compress.runtimes.graph_embedder import GraphEmbedder, threads_and_streams
from compress.runtimes.loading import open_source
from compress.runtimes.lower import lower_layer
from compress.runtimes.torch_runtime import prepare
from compress.search.choices import AS_STORED, DROPPED, Choice, choices_for, part_of, step_of
from compress.search.groups import HEAD, TABLE, WHOLE, Group
from compress.search.items import FLOAT32, WHOLE_MODEL, Setting, settings_of
from compress.search.sensitivity import Subject

ROUNDS = 7
LENGTH = 64
"""Tokens of the texts that the whole model is timed on."""
TEXTS = CPU_BATCH_TOKENS // LENGTH
LARGEST_INPUT = 4.0
"""Where static scales end: of a thousand numbers with the variance 1 hardly one is larger."""


def milliseconds(subject: Subject, plain: Callable[[], ModelFolder]) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a batch of tokens through each group with each choice, by their names.

    Under the name "" stands the whole model: under `float32` in torch, which speed-ups are relative to, and under `float16` as the
    runtime runs the variant without any step. Groups in blocks that are narrower stand under names of their own (`Setting.key`).
    Layers of the same shape are timed once. What is not a matrix product counts as the whole's share of a block, which is saved
    where a block is left out.

    Args:
        subject: the model, its choices and the runtime.
        plain: makes the variant without any step, for runtimes that execute graphs.

    Raises:
        UserError: the runtime runs on no CPU, or is not installed.
    """
    clock = _clock(subject, plain)
    found: dict[str, dict[str, float]] = {}
    settings = settings_of(subject.choices, subject.shape)
    for group, choices in subject.choices.items():
        if group.kind in (TABLE, WHOLE):
            continue
        for setting in settings[group]:
            fitting = choices_for(group, setting.shape, subject.options.runtime, [choice.name for choice in choices])
            found[setting.key(group)] = {choice.name: _group_ms(group, choice, setting, clock) for choice in fitting}
    inside = sum(found[group.name][AS_STORED] for group in settings if group.name in found)
    rest = max(clock.whole - inside, 0.0) / max(1, subject.shape.blocks)
    for group, choices in subject.choices.items():
        if group.kind == WHOLE and any(choice.name == DROPPED for choice in choices):
            found[group.name] = {DROPPED: -rest}
    baseline = clock.whole if subject.options.runtime == TORCH else _model_ms(subject)
    return {**found, WHOLE_MODEL: {FLOAT32: baseline, AS_STORED: clock.whole}}


@dataclass
class _Clock:
    """Times layers in a runtime, each kind once."""

    whole: float
    """Milliseconds of the whole model without any step."""
    layer: Callable[[tuple[int, ...], QuantizedLayer | None], float]
    """Returns those of a layer with weights [out, in]."""
    known: dict[tuple[tuple[int, ...], str], float] = field(default_factory=dict)

    def of(self, shape: tuple[int, ...], kind: QuantizedLayer | None) -> float:
        """Return the milliseconds of a batch of tokens through a layer with weights [out, in]; `kind`: how it is stored."""
        key = (shape, "float" if kind is None else kind.model_dump_json())
        if key not in self.known:
            self.known[key] = self.layer(shape, kind)
        return self.known[key]


def _clock(subject: Subject, plain: Callable[[], ModelFolder]) -> _Clock:
    """Return what times layers in the runtime that a subject names.

    Raises:
        UserError: it runs on no CPU, or is not installed.
    """
    runtime = subject.options.runtime
    if runtime == TORCH:
        return _Clock(_model_ms(subject), _layer_ms)
    if runtime not in GRAPH_RUNTIMES:
        raise UserError(f"--min-speedup: layers are not timed in {runtime}", f"--runtime {', '.join((TORCH, *GRAPH_RUNTIMES))}")
    pick_runtime(runtime, {})
    folder = plain()
    embedder = open_source(folder, runtime=runtime)
    assert isinstance(embedder, GraphEmbedder)
    # Batches run side by side, one a stream: a batch takes that much less of the time that passes.
    threads, streams = threads_and_streams(folder, None)
    ids = np.ones((TEXTS, LENGTH), dtype=np.int64)
    whole = _timed(lambda: embedder.run([ids] * len(graph_inputs(folder.spec.pool_prompt))))
    return _Clock(_rounded(whole / streams), partial(_graph_layer_ms, runtime, threads // streams, streams))


def _group_ms(group: Group, choice: Choice, setting: Setting, clock: _Clock) -> float:
    """Return the time of a group's layers one after another."""
    weights = setting.shape.head_linears if group.kind == HEAD else setting.shape.block_linears
    stored = _stored(setting.shape, group, choice)
    return sum(clock.of(weights[layer].shape, stored.get(layer)) for layer in group.layers)


def _stored(shape: ModelShape, group: Group, choice: Choice) -> Mapping[str, QuantizedLayer]:
    step = step_of(choice, group, shape)
    return {} if step is None else step.estimate(part_of(shape, group)).quantized


def _layer_ms(shape: tuple[int, ...], kind: QuantizedLayer | None) -> float:
    """Return the milliseconds of a batch of tokens through a layer with random weights [out, in] in torch."""
    holder = prepare(nn.Sequential(_layer_of(shape, kind)), torch.float32, torch.device("cpu"))
    rows = _rows(shape[1])
    return _timed(lambda: holder(rows))


def _graph_layer_ms(runtime: str, threads: int, streams: int, shape: tuple[int, ...], kind: QuantizedLayer | None) -> float:
    """Return the same in a runtime that executes graphs, where so many batches run side by side."""
    with TemporaryDirectory() as folder:
        graph = lower_layer(_layer_of(shape, kind), Path(folder), runtime)
        run, rows = attribute(f"{RUNTIMES[runtime].opener}:open_graph")(graph, threads), _rows(shape[1]).numpy()
        return _rounded(_timed(lambda: run(rows)) / streams)


def _rows(width: int) -> torch.Tensor:
    """Return a layer's inputs, float32 [texts, tokens, width]."""
    return torch.randn(TEXTS, LENGTH, width, generator=torch.Generator().manual_seed(1))


def _layer_of(shape: tuple[int, ...], kind: QuantizedLayer | None) -> nn.Module:
    """Return a layer with random weights [out, in], stored as `kind` says."""
    layer = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    layer.weight.data = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * shape[1] ** -0.5
    if kind is None:
        return layer
    if kind.numbers is Numbers.FLOAT8:
        return Float8Linear.from_float(layer, kind.activations)
    grid = find_grid(layer.weight, kind.bits, kind.group_size, kind.symmetric)
    step = torch.tensor(LARGEST_INPUT / QMAX) if kind.activations is ActivationScheme.STATIC_PER_TENSOR else None
    return QuantizedLinear.from_integers(grid.round(layer.weight), grid, layer.bias, kind.activations, input_scale=step)


def _model_ms(subject: Subject) -> float:
    """Return the milliseconds of as many tokens through the blocks, with random weights, in float32."""
    model = empty_model(subject.source).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    model = prepare(model, torch.float32, torch.device("cpu"))
    ids = torch.ones(TEXTS, LENGTH, dtype=torch.int64)
    return _timed(lambda: backbone_of(model)(input_ids=ids, attention_mask=torch.ones_like(ids)))


@torch.inference_mode()
def _timed(call: object) -> float:
    """Return the median milliseconds of a call, to three digits."""
    assert callable(call)
    call()
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return _rounded(1e3 * median(taken))


def _rounded(ms: float) -> float:
    return float(f"{ms:.3g}")
