"""What the methods that work on linear layers share: which layers these are, and which of their weights were pruned before."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from compress.methods.base import Method
from compress.models.architectures import is_block_linear, is_head_linear
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape, check_patterns, matching

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.models.network.segments import Parts


# A layer with as many zeros has been pruned, and its zeros stay.
PRUNED_SHARE = 0.05


def zeros_of(weight: torch.Tensor) -> torch.Tensor | None:
    """Return which weights are zero, bool [out, in], where a step before has pruned them.

    None where hardly any is, and where all are: a new student's layer that begins so.
    """
    zero = weight == 0
    return zero if PRUNED_SHARE <= float(zero.float().mean()) < 1 else None


class LinearsMethod(Method):
    """A method that changes or replaces linear layers."""

    skip: tuple[str, ...] = ()
    """Layers left alone: shell-style patterns of their names, such as "*.output.dense"."""
    head: bool = False
    """Whether the linear layers of NV-Embed's folded head are among them; 3 % of NV-Embed-v2's weights, used once a token."""

    def patterns(self) -> Iterable[str]:
        """Return every pattern of the config, each of which must match a layer."""
        return self.skip

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Choose among the names of linear layers."""
        names = list(names)
        left = matching(names, self.skip)
        return [name for name in names if name not in left]

    def linears_in(self, parts: Parts) -> dict[str, nn.Linear]:
        """Return the linear layers of a segment that the method works on, by name.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        import torch
        from torch import nn

        found: dict[str, nn.Linear] = {}
        for path, part in parts.items():
            for inner, module in part.named_modules():
                name = f"{path}.{inner}"
                if isinstance(module, nn.Linear) and (
                    is_block_linear(f"{name}.weight", module.weight.dim()) or (self.head and is_head_linear(f"{name}.weight"))
                ):
                    found[name] = module
        chosen = {name: found[name] for name in self.chosen(found)}
        for name, linear in chosen.items():
            if not torch.isfinite(linear.weight).all():
                raise ValueError(f"{name}.weight holds NaN or infinity; {self.method} left it alone")
        return chosen

    def work_bytes(self, linears: list[TensorInfo]) -> int:
        """Return the memory that is taken besides copies of the largest weight."""
        return 0

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Return the operations of what is more than passes over the weights; those of running the texts are not among them."""
        return 0.0

    def linears_of(self, shape: ModelShape) -> tuple[dict[str, TensorInfo], list[str]]:
        """Return a shape's linear layers, by name, and the names of those that the method works on.

        Raises:
            ValueError: a pattern matches none of them, there is no head, or no layer is left.
        """
        linears = {**shape.block_linears, **(shape.head_linears if self.head else {})}
        check_patterns(linears, self.patterns())
        chosen = self.chosen(linears)
        if self.head and not shape.head_linears:
            raise ValueError(f"{shape.name} has no folded latent-attention head; leave `head` out")
        if not chosen:
            raise ValueError(f"{shape.name} has no linear layer left for {self.method}")
        return linears, chosen
