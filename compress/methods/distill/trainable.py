"""A network as it can be trained: pruned weights that stay zero, integers that stay as they are, low-rank changes of the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.nn.utils import parametrize

from compress.layers.compressed import CompressedLayer
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear
from compress.methods.distill.rounding import learned, learning
from compress.methods.linear_layers import zeros_of
from compress.models.network.segments import blocks_of


@contextmanager
def trainable(network: nn.Module, rank: int | None = None, *, integers: str = "frozen", sharded: bool = False) -> Iterator[None]:
    """Make a network trainable for a while.

    Layers in integers are stood in for by plain ones with their values; activations that they quantize are left in floating point
    meanwhile.

    Args:
        network: float32 where it is not in integers.
        rank: train nothing but a product of two matrices of this rank, added to each of the blocks' linear layers (LoRA: Hu et al.
            2021, arXiv 2106.09685), and add it up afterwards. Not peft's: that adds to a layer's output, so that a pruned layer's
            zeros would be filled when it is added up; here they are left out of the product.
        integers: `frozen`, of such layers the bias alone is trained; `trained`, integers and scales are too, see `Rounded`.
        sharded: whether the parameters are to be divided among processes.

    Raises:
        ValueError: a layer is stored in numbers that this does not know, no layer is left for a low-rank change, or a layer that is
            pruned or in integers is to be divided.
    """
    stood_for: dict[str, QuantizedLinear | QuantizedEmbedding] = {}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear) or (isinstance(module, QuantizedEmbedding) and integers == "trained"):
            stood_for[name] = module
        elif isinstance(module, CompressedLayer) and not isinstance(module, QuantizedEmbedding):
            raise ValueError(
                f"{name} is stored as {module.layer.name}, which cannot be trained around; put distill before that step"
            )
    if integers == "trained" and not stood_for:
        raise ValueError("no layer is in integers that could be trained; put the step that makes them before distill")
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    zeros = {name: zero for name, linear in linears.items() if (zero := zeros_of(linear.weight.detach())) is not None}
    if sharded and (stood_for or zeros):
        name = next(iter(stood_for or zeros))
        raise ValueError(
            f"{name} is {'in integers' if stood_for else 'pruned'}, which cannot be kept in parts; leave `sharded` out"
        )
    network.requires_grad_(rank is None)
    for name, layer in stood_for.items():
        try:
            # Tables are among them where integers learn alone.
            standing = layer.plain() if integers == "frozen" and isinstance(layer, QuantizedLinear) else learning(layer)
            network.set_submodule(name, standing)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
    hooks, changed = [], list[nn.Linear]()
    if rank is None:
        hooks = [linears[name].weight.register_hook(partial(_without, zero=zero)) for name, zero in zeros.items()]  # type: ignore[no-untyped-call]
    else:
        changed = _changed_by(network, linears, zeros, rank)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear in changed:
            parametrize.remove_parametrizations(linear, "weight")
        for name, layer in stood_for.items():
            plain = network.get_submodule(name)
            if integers == "trained":
                learned(layer, plain)
            if getattr(plain, "bias", None) is not None:
                setattr(layer, "bias", nn.Parameter(plain.bias.detach(), requires_grad=False))  # type: ignore[operator, union-attr] # noqa: B010  typed as a tensor
            network.set_submodule(name, layer)
        network.requires_grad_(False)


def _changed_by(
    network: nn.Module, linears: Mapping[str, nn.Linear], zeros: Mapping[str, torch.Tensor], rank: int
) -> list[nn.Linear]:
    """Give those of the linear layers that are in blocks a low-rank change, which is trained, and return them."""
    path = blocks_of(network)[0]
    changed = {name: linear for name, linear in linears.items() if name.startswith(f"{path}.")}
    if not changed:
        raise ValueError("every linear layer is in integers, which cannot take a low-rank change; leave `lora` out")
    for name, linear in changed.items():
        parametrize.register_parametrization(linear, "weight", _LowRank(linear.weight.shape, rank, zeros.get(name)))
    return list(changed.values())


class _LowRank(nn.Module):
    """A weight with a low-rank change, which leaves alone what pruning took away."""

    zero: torch.Tensor | None

    def __init__(self, shape: torch.Size, rank: int, zero: torch.Tensor | None) -> None:
        super().__init__()
        outputs, inputs = shape
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        change = self.up @ self.down
        return weight + (change if self.zero is None else change.masked_fill(self.zero, 0))


def _without(gradient: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Give weights that are zero no gradient: then neither momentum nor decay moves them."""
    return gradient.masked_fill(zero.to(gradient.device), 0)
