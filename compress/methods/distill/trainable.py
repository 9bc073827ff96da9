"""A network as it can be trained: pruned weights that stay zero, integers that stay as they are and let gradients through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from compress.layers.compressed import CompressedLayer
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear

# Share of zeros from which on a layer is taken for a pruned one. All zero is a new student's layer that begins so.
PRUNED = 0.2


@contextmanager
def trainable(network: nn.Module) -> Iterator[None]:
    """Make a network trainable for a while.

    Layers in integers are stood in for by plain ones with their values, of which the bias alone is trained; activations that they
    quantize are left in floating point meanwhile.

    Raises:
        ValueError: a layer is stored in numbers that this does not know.
    """
    integers: dict[str, QuantizedLinear] = {}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear):
            integers[name] = module
        elif isinstance(module, CompressedLayer) and not isinstance(module, QuantizedEmbedding):
            raise ValueError(
                f"{name} is stored as {module.layer.name}, which cannot be trained around; put distill before that step"
            )
    network.requires_grad_(True)
    for name, layer in integers.items():
        network.set_submodule(name, _plain(layer))
    hooks = [hook for module in network.modules() if isinstance(module, nn.Linear) for hook in _keeping_zeros(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for name, layer in integers.items():
            plain = network.get_submodule(name)
            assert isinstance(plain, nn.Linear)
            if plain.bias is not None:
                setattr(layer, "bias", nn.Parameter(plain.bias.detach(), requires_grad=False))  # noqa: B010  typed as a tensor
            network.set_submodule(name, layer)
        network.requires_grad_(False)


def _plain(layer: QuantizedLinear) -> nn.Linear:
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    weight = layer.dequantized()
    plain.weight = nn.Parameter(weight if layer.input_factor is None else weight.div_(layer.input_factor), requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.float().clone())
    return plain


def _keeping_zeros(linear: nn.Linear) -> list[torch.utils.hooks.RemovableHandle]:
    """Give weights of a pruned layer that are zero no gradient: then neither momentum nor decay moves them."""
    zero = linear.weight.detach() == 0
    if not linear.weight.requires_grad or not PRUNED < zero.float().mean() < 1:
        return []
    return [linear.weight.register_hook(partial(_without, zero=zero))]  # type: ignore[no-untyped-call]


def _without(gradient: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return gradient.masked_fill(zero.to(gradient.device), 0)
