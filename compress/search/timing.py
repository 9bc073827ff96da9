"""Milliseconds of each choice for each group of layers, measured shape by shape on this machine in torch."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median

import torch
from torch import nn

from compress.common.errors import UserError
from compress.layers.float8_linear import Float8Linear
from compress.layers.grid import find_grid
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import Numbers, QuantizedLayer
from compress.models.network.pooling import backbone_of
from compress.models.opened import empty_model
from compress.models.shape import ModelShape
from compress.runtimes.contract import CPU_BATCH_TOKENS, TORCH
from compress.runtimes.torch_runtime import prepare
from compress.search.choices import AS_STORED, DROPPED, Choice, choices_for, part_of, step_of
from compress.search.groups import HEAD, TABLE, WHOLE, Group
from compress.search.items import FLOAT32, WHOLE_MODEL, Setting, settings_of
from compress.search.sensitivity import Subject

ROUNDS = 7
LENGTH = 64
"""Tokens of the texts that the whole model is timed on."""


def milliseconds(subject: Subject) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a batch of tokens through each group with each choice, by their names.

    Under the name "" stands the whole model in float32, and under `float32` each group as it is. Groups in blocks that are narrower
    stand under names of their own (`Setting.key`). Layers of the same shape are timed once. What is not a matrix product counts as
    the whole's share of a block, which is saved where a block is left out.

    Raises:
        UserError: the runtime is not torch.
    """
    if subject.options.runtime != TORCH:
        raise UserError(f"--min-speedup: layers are timed in torch only, not in {subject.options.runtime}", "--runtime torch")
    timed: dict[tuple[tuple[int, ...], str], float] = {}
    found: dict[str, dict[str, float]] = {}
    settings = settings_of(subject.choices, subject.shape)
    for group, choices in subject.choices.items():
        if group.kind in (TABLE, WHOLE):
            continue
        for setting in settings[group]:
            fitting = choices_for(group, setting.shape, subject.options.runtime, [choice.name for choice in choices])
            found[setting.key(group)] = {choice.name: _group_ms(group, choice, setting, timed) for choice in fitting}
        found[group.name][FLOAT32] = found[group.name][AS_STORED]
    whole = _model_ms(subject)
    found[WHOLE_MODEL] = {FLOAT32: whole}
    inside = sum(times.get(FLOAT32, 0.0) for name, times in found.items() if name != WHOLE_MODEL)
    rest = max(whole - inside, 0.0) / max(1, subject.shape.blocks)
    for group, choices in subject.choices.items():
        if group.kind == WHOLE and any(choice.name == DROPPED for choice in choices):
            found[group.name] = {DROPPED: -rest}
    return found


def _group_ms(group: Group, choice: Choice, setting: Setting, timed: dict[tuple[tuple[int, ...], str], float]) -> float:
    """Return the time of a group's layers one after another."""
    weights = setting.shape.head_linears if group.kind == HEAD else setting.shape.block_linears
    stored = _stored(setting.shape, group, choice)
    total = 0.0
    for layer in group.layers:
        shape = weights[layer].shape
        kind = stored.get(layer)
        key = (shape, "float" if kind is None else kind.model_dump_json())
        if key not in timed:
            timed[key] = _layer_ms(shape, kind)
        total += timed[key]
    return total


def _stored(shape: ModelShape, group: Group, choice: Choice) -> Mapping[str, QuantizedLayer]:
    step = step_of(choice, group, shape)
    return {} if step is None else step.estimate(part_of(shape, group)).quantized


def _layer_ms(shape: tuple[int, ...], kind: QuantizedLayer | None) -> float:
    """Return the milliseconds of a batch of tokens through a layer with random weights [out, in]."""
    generator = torch.Generator().manual_seed(0)
    layer: nn.Module = nn.Linear(shape[1], shape[0]).requires_grad_(False)
    layer.weight.data = torch.randn(shape, generator=generator) * shape[1] ** -0.5  # type: ignore[operator]
    if kind is not None:
        layer = _as_stored(layer, kind)
    holder = prepare(nn.Sequential(layer), torch.float32, torch.device("cpu"))
    rows = torch.randn(CPU_BATCH_TOKENS, shape[1], generator=generator)
    return _timed(lambda: holder(rows))


def _as_stored(layer: nn.Module, kind: QuantizedLayer) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    if kind.numbers is Numbers.FLOAT8:
        return Float8Linear.from_float(layer, kind.activations)
    grid = find_grid(layer.weight, kind.bits, kind.group_size, kind.symmetric)
    return QuantizedLinear.from_integers(grid.round(layer.weight), grid, layer.bias, kind.activations)


def _model_ms(subject: Subject) -> float:
    """Return the milliseconds of as many tokens through the blocks, with random weights, in float32."""
    model = empty_model(subject.source).to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.02
    model = prepare(model, torch.float32, torch.device("cpu"))
    ids = torch.ones(CPU_BATCH_TOKENS // LENGTH, LENGTH, dtype=torch.int64)
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
    return float(f"{1e3 * median(taken):.3g}")
