"""A network made trainable: pruned weights stay zero, integers stay fixed or learn, low-rank updates if wanted."""

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
from compress.methods.distill.shared_map import put_map, take_map
from compress.methods.linear_layers import zeros_of
from compress.models.network.segments import blocks_of

Integers = QuantizedLinear | QuantizedEmbedding


@contextmanager
def trainable(
    network: nn.Module, rank: int | None = None, *, integers: str = "frozen", sharded: bool = False, mapped: bool = False
) -> Iterator[None]:
    """Make a network trainable inside a `with` block.

    Quantized layers are replaced by plain ones with their values; activations that they quantize stay in floating point meanwhile.

    Args:
        network: float32, except for its quantized layers.
        rank: train only a product of two matrices of this rank, added to each of the blocks' linear layers (LoRA: Hu et al. 2021,
            arXiv 2106.09685), and add it to the weights afterwards. This does not use peft, which adds to a layer's output, so that
            merging would fill a pruned layer's zeros; here zeros are masked out of the product.
        integers: `frozen`: of quantized layers only the bias is trained; `trained`: integers and scales are too, see `Rounded`.
        sharded: whether the parameters will be split among processes.
        mapped: whether the rows of a static table also learn through one map; see `SharedMap`.

    Raises:
        ValueError: a layer has a number format that cannot be trained around, no layer is left for a low-rank update, or a pruned
            or quantized layer would be split among processes.
    """
    quantized = _quantized_in(network, integers)
    linears = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    zeros = {name: zero for name, linear in linears.items() if (zero := zeros_of(linear.weight.detach())) is not None}
    if sharded and (quantized or zeros):
        name = next(iter(quantized or zeros))
        what = "in integers" if quantized else "pruned"
        raise ValueError(f"{name} is {what}, which cannot be split among processes; leave `sharded` out")
    network.requires_grad_(rank is None)
    _put_plain_layers(network, quantized, integers)
    if mapped:
        put_map(network)
    hooks, updated = [], list[nn.Linear]()
    if rank is None:
        hooks = [linears[name].weight.register_hook(partial(_without, zero=zero)) for name, zero in zeros.items()]  # type: ignore[no-untyped-call]
    else:
        updated = _with_low_rank_updates(network, linears, zeros, rank)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for linear in updated:
            parametrize.remove_parametrizations(linear, "weight")
        if mapped:
            take_map(network)
        _put_quantized_layers(network, quantized, integers)
        network.requires_grad_(False)


def _quantized_in(network: nn.Module, integers: str) -> dict[str, Integers]:
    """Return the quantized layers that plain ones replace, by name; tables only if integers are trained."""
    found: dict[str, Integers] = {}
    for name, module in network.named_modules():
        if isinstance(module, QuantizedLinear) or (isinstance(module, QuantizedEmbedding) and integers == "trained"):
            found[name] = module
        elif isinstance(module, CompressedLayer) and not isinstance(module, QuantizedEmbedding):
            raise ValueError(
                f"{name} is stored as {module.layer.name}, which cannot be trained around; put distill before that step"
            )
    if integers == "trained" and not found:
        raise ValueError("there are no integers to train; put the step that quantizes before distill")
    return found


def _put_plain_layers(network: nn.Module, quantized: Mapping[str, Integers], integers: str) -> None:
    """Replace quantized layers by plain ones with their values."""
    for name, layer in quantized.items():
        try:
            plain = layer.plain() if integers == "frozen" and isinstance(layer, QuantizedLinear) else learning(layer)
            network.set_submodule(name, plain)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error


def _put_quantized_layers(network: nn.Module, quantized: Mapping[str, Integers], integers: str) -> None:
    """Put the quantized layers back, with the biases, and if trained the integers and scales, of the plain ones."""
    for name, layer in quantized.items():
        plain = network.get_submodule(name)
        if integers == "trained":
            learned(layer, plain)
        if getattr(plain, "bias", None) is not None:
            setattr(layer, "bias", nn.Parameter(plain.bias.detach(), requires_grad=False))  # type: ignore[operator, union-attr] # noqa: B010  typed as a tensor
        network.set_submodule(name, layer)


def _with_low_rank_updates(
    network: nn.Module, linears: Mapping[str, nn.Linear], zeros: Mapping[str, torch.Tensor], rank: int
) -> list[nn.Linear]:
    """Give the blocks' linear layers a trainable low-rank update each, and return these layers."""
    path = blocks_of(network)[0]
    updated = {name: linear for name, linear in linears.items() if name.startswith(f"{path}.")}
    if not updated:
        raise ValueError("every linear layer is in integers, which cannot take a low-rank update; leave `lora` out")
    for name, linear in updated.items():
        parametrize.register_parametrization(linear, "weight", _LowRank(linear.weight.shape, rank, zeros.get(name)))
    return list(updated.values())


class _LowRank(nn.Module):
    """A weight plus a low-rank update that leaves pruned weights zero."""

    zero: torch.Tensor | None

    def __init__(self, shape: torch.Size, rank: int, zero: torch.Tensor | None) -> None:
        super().__init__()
        outputs, inputs = shape
        # LoRA, section 4.1: W + B A, with a random Gaussian A and B = 0, so that training starts from W.
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        update = self.up @ self.down
        return weight + (update if self.zero is None else update.masked_fill(self.zero, 0))


def _without(gradient: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Set the gradient of zero weights to zero, so that neither momentum nor decay moves them."""
    return gradient.masked_fill(zero.to(gradient.device), 0)
