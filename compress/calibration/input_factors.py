"""Factors moved out of what makes an input and into the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress.calibration.inputs import Inputs
from compress.models.network.segments import Parts


def scale_inputs(parts: Parts, inputs: Inputs, layers: Sequence[nn.Linear], factor: torch.Tensor) -> torch.Tensor | None:
    """Divide the common input of some layers by a factor and multiply their weights' columns by it, which changes nothing.

    Done where the division can be put into what makes the input: a norm's weight and bias, or the rows of a linear layer. Whether
    it can is found out by doing it and running the segment on a few texts: an input that something else reads too, or that has
    passed an activation function, changes what the segment answers. So no architecture is written down here.

    Args:
        parts: the segment's modules; changed.
        inputs: the texts.
        layers: linear layers of the segment that are given one and the same input.
        factor: float32 [in], positive.

    Returns:
        None where it was done. The factor where it was not, and nothing is changed: the layers' input has then to be divided by it
        while they run, and their columns to be multiplied.
    """
    expected = inputs.sample(parts).float()
    makers: list[Any] = [module for part in parts.values() for module in part.modules() if _may_make(module, layers)]
    for maker in reversed(makers):
        bias = getattr(maker, "bias", None)
        before = [(tensor, tensor.clone()) for tensor in ([maker.weight.data] if bias is None else [maker.weight.data, bias.data])]
        columns = [(layer, layer.weight.data) for layer in layers]
        for tensor, old in before:
            tensor.copy_(old / (factor[:, None] if tensor.dim() == 2 else factor).to(old.dtype))
        # What the maker's dtype has made of the factor, which is what the columns must make up for.
        kept = before[0][1].float() / before[0][0].float()
        kept = torch.where(kept.isfinite(), kept, factor[:, None] if kept.dim() == 2 else factor)
        _scale_columns(columns, kept.mean(dim=1) if kept.dim() == 2 else kept)
        if torch.allclose(inputs.sample(parts).float(), expected, rtol=0, atol=_tolerance(expected, columns[0][1].dtype)):
            return None
        for tensor, old in before:
            tensor.copy_(old)
        for layer, weight in columns:
            layer.weight.data = weight
    return factor


def _scale_columns(columns: Sequence[tuple[nn.Linear, torch.Tensor]], factor: torch.Tensor) -> None:
    """Multiply columns by a factor, in float32; the weights keep their dtype."""
    for layer, weight in columns:
        layer.weight.data = (weight.float() * factor).to(weight.dtype)


def _may_make(module: nn.Module, layers: Sequence[nn.Linear]) -> bool:
    """Whether a module's output could be the input of layers, by its sizes."""
    if any(module is layer for layer in layers):
        return False
    width = layers[0].in_features
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features == width
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)


def _tolerance(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding alone may change."""
    return float(expected.abs().max()) * max(32 * torch.finfo(dtype).eps, 1e-4)
