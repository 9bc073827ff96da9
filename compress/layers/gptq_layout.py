"""The tensors of the GPTQ layout, version 1, which our export writes and GPTQModel's kernels take."""

from __future__ import annotations

import torch

from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.torch_packing import words

BITS = (2, 3, 4, 8)
RUN = 32
"""Readers allocate multiples of 32 values along the inputs and along the outputs."""


def gptq_tensors(layer: QuantizedLinear) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer whose sizes are multiples of `RUN`, without its bias.

    `qweight` int32 [in x bits / 32, out], packed along the inputs; `qzeros` int32 [groups, out x bits / 32], zeros minus one,
    packed along the outputs; `scales` [groups, out]; `g_idx` int32 [in], the group of each input. Our zeros are at least 1, so zero
    minus one never wraps around.
    """
    bits = layer.layer.bits
    group = layer.layer.group_size or layer.in_features
    return {
        "qweight": words(layer.integers(), bits).t(),
        "qzeros": words((layer.zeros() - 1).t().contiguous(), bits),
        "scales": layer.weight_scale.view(layer.out_features, -1).t(),
        "g_idx": torch.arange(layer.in_features, dtype=torch.int32, device=layer.weight_scale.device) // group,
    }
