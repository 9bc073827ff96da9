"""Layers that do in one pass over memory what a network does in several: norms, and the gated MLP's product. Triton only.

Each one stands in the place of a module whose arithmetic it was found to have, by trying both on the same input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from compress.layers.kernels import failures
from compress.layers.kernels.choice import MAKER, carry, row_kernels
from compress.layers.merged import Merged, Part
from compress.layers.scheme import Numbers

GATE, UP, DOWN, ACTIVATION = "gate_proj", "up_proj", "down_proj", "act_fn"
"""Names of a gated MLP's modules."""
ROUNDINGS = 16
"""Roundings of its dtype that a fused module may be from the module that it replaces."""


class FusedNorm(nn.Module):
    """LayerNorm or RMSNorm. Once a layer has asked, it also rounds its output for that layer's product, in the same pass."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, eps: float, kind: Any) -> None:
        """Take the parameters, [width], and the `NormKind`."""
        super().__init__()
        self.weight, self.bias = weight, bias
        self.eps, self.kind = eps, kind
        self.asked: Numbers | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension of `x`, in its dtype."""
        y: torch.Tensor
        y, rounded = row_kernels(x.device.type).normalize(x, self.weight, self.bias, self.eps, self.kind, self.asked)
        if not torch.compiler.is_compiling():
            setattr(y, MAKER, self)
            if rounded is not None:
                carry(y, rounded)
        return y


class FusedGatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))` with gate and up as one product. Where `down` rounds its input, only that is stored."""

    def __init__(self, mlp: nn.Module, merged: Merged) -> None:
        """Take over the MLP's modules under their names."""
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self._merged = [merged]  # in a list: it is a module of the parts already

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., width] to [..., width]."""
        kernels = row_kernels(x.device.type)
        gate_up: torch.Tensor = self._merged[0](x)
        down: Any = self.get_submodule(DOWN)
        numbers = getattr(down, "takes", None)
        if numbers is None or row_kernels(x.device.type, numbers) is None:
            y: torch.Tensor = down(kernels.gated(gate_up))
            return y
        product: torch.Tensor = down.multiply(kernels.gated_rounded(gate_up, numbers), x.dtype)
        return product.view(*x.shape[:-1], product.shape[-1])


def fused_norm(norm: nn.Module) -> FusedNorm | None:
    """Return a fused norm in place of `norm`, whose parameters are on their device; None where its arithmetic is not known.

    What is not a plain LayerNorm is tried: a module with one vector of weights is an RMSNorm of the kind whose results it gives,
    bit for bit, in bfloat16 and in float32.
    """
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or any(True for _ in norm.children()):
        return None
    kernels = row_kernels(weight.device.type)
    if kernels is None or weight.shape[0] > kernels.WIDEST:
        return None
    if type(norm) is nn.LayerNorm:
        return _tried(FusedNorm(weight, bias, norm.eps, kernels.NormKind(centred=True, rounds_first=False)), norm)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float) or "norm" not in type(norm).__name__.lower() or len(list(norm.parameters())) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    sample = (torch.randn((4, weight.shape[0]), generator=generator) * 3).to(weight.device)
    for kind in (kernels.NormKind(False, True), kernels.NormKind(False, False), kernels.NormKind(False, False, offset=1.0)):
        with torch.no_grad():
            alike = all(torch.equal(norm(x), _eager(x, weight, eps, kind)) for x in (sample, sample.bfloat16()))
        if alike:
            return _tried(FusedNorm(weight, None, eps, kind), norm)
    return None


def _tried(fused: FusedNorm, norm: nn.Module) -> FusedNorm | None:
    """Return a fused norm that computes on its device what the norm does; None for one that does not."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((5, fused.weight.shape[0]), generator=generator).mul_(3).to(fused.weight.device, fused.weight.dtype)
    return fused if _gives(fused, norm, x, ROUNDINGS * torch.finfo(x.dtype).eps) else None


def _gives(fused: nn.Module, module: nn.Module, x: torch.Tensor, close: float) -> bool:
    """Whether a fused module gives the module's outputs for `x`, on its device; `close`: largest difference, relative."""
    with torch.no_grad():
        expected = module(x)
        try:
            found = fused(x)
        except failures():
            return False
    return torch.allclose(found, expected, rtol=close, atol=close * float(expected.abs().max()))


def _eager(x: torch.Tensor, weight: torch.Tensor, eps: float, kind: Any) -> torch.Tensor:
    """Compute an RMSNorm of a kind with torch's operators."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y: torch.Tensor = weight * normal.to(x.dtype) if kind.rounds_first else (normal * (kind.offset + weight.float())).to(x.dtype)
    return y


def fused_mlp(mlp: nn.Module, device: torch.device, dtype: torch.dtype) -> FusedGatedMLP | None:
    """Return a fused MLP in place of one whose gate and up are merged; None where it is not `down(silu(gate(x)) * up(x))`.

    Args:
        mlp: the MLP, ready to run.
        device: the device it runs on.
        dtype: the compute dtype.
    """
    children = dict(mlp.named_children())
    if not {GATE, UP, DOWN, ACTIVATION} <= set(children):
        return None
    gate, up = children[GATE], children[UP]
    if not isinstance(gate, Part) or not isinstance(up, Part) or gate.merged is not up.merged or (gate.part, up.part) != (0, 1):
        return None
    width = gate.out_features
    kernels = row_kernels(device.type)
    if kernels is None or gate.out_features != up.out_features or width > kernels.WIDEST:
        return None
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(64, generator=generator).to(device)
    x = torch.randn((2, gate.in_features), generator=generator).to(device, dtype)
    with torch.inference_mode():
        act = children[ACTIVATION]
        if not torch.allclose(act(gates), F.silu(gates), rtol=1e-6, atol=1e-7):
            return None
        down = children[DOWN]
        if not torch.equal(mlp(x), down(act(gate(x)) * up(x))):
            return None
        fused = FusedGatedMLP(mlp, gate.merged)
        # A value that lies between two integers may be rounded to either.
        close = ROUNDINGS * torch.finfo(dtype).eps if getattr(down, "takes", None) is None else 0.05
        return fused if _gives(fused, mlp, x, close) else None
