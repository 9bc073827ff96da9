"""Scaling factors moved from an input into the layers that read it, as AWQ and SmoothQuant need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress.calibration.inputs import Inputs
from compress.models.network.segments import Parts


def scale_inputs(parts: Parts, inputs: Inputs, layers: Sequence[nn.Linear], factor: torch.Tensor) -> torch.Tensor | None:
    """Divide the common input of some layers by a factor and multiply their weights' columns by it, so that nothing changes.

    The division goes into the module that makes the input: a norm's weight and bias, or the rows of a linear layer. Which module
    that is, if any, is found by trying each and running the segment on a few texts: if something else reads the input too, or if it
    passes an activation function, the segment's output changes. So no architecture is written down here.

    Args:
        parts: the segment's modules; they are changed.
        inputs: the calibration texts at this segment.
        layers: linear layers of the segment that share one input.
        factor: the factor, positive, float32 [in].

    Returns:
        None if it was done. Otherwise the factor, and nothing is changed: the layers then have to divide their input by it when
        they run, and their columns have to be multiplied by it.
    """
    expected = inputs.sample(parts).float()
    makers: list[Any] = [module for part in parts.values() for module in part.modules() if _may_make(module, layers)]
    for maker in reversed(makers):
        bias = getattr(maker, "bias", None)
        before = [(tensor, tensor.clone()) for tensor in ([maker.weight.data] if bias is None else [maker.weight.data, bias.data])]
        columns = [(layer, layer.weight.data) for layer in layers]
        for tensor, old in before:
            tensor.copy_(old / (factor[:, None] if tensor.dim() == 2 else factor).to(old.dtype))
        # The factor after rounding to the maker's dtype, which is what the columns have to make up for.
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
    """Multiply the columns of weights by a factor in float32; the weights keep their dtype."""
    for layer, weight in columns:
        layer.weight.data = (weight.float() * factor).to(weight.dtype)


def _may_make(module: nn.Module, layers: Sequence[nn.Linear]) -> bool:
    """Whether a module's output could be the input of the layers, judging by its sizes."""
    if any(module is layer for layer in layers):
        return False
    width = layers[0].in_features
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features == width
    return isinstance(weight, nn.Parameter) and tuple(weight.shape) == (width,)


def _tolerance(expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference that rounding alone can make."""
    return float(expected.abs().max()) * max(32 * torch.finfo(dtype).eps, 1e-4)
