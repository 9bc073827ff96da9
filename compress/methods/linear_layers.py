"""What methods on linear layers share: which layers they work on, statistics of their inputs, and weights that were pruned
before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from compress.methods.base import Method, StepOverride
from compress.models.architectures import TRANSPOSED, is_block_linear, is_head_linear
from compress.models.files.headers import TensorInfo
from compress.models.shape import ModelShape, check_patterns, matching

if TYPE_CHECKING:
    import torch
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.calibration.statistics import S
    from compress.models.network.segments import Parts


# A layer with at least this share of zeros counts as pruned, and its zeros stay.
PRUNED_SHARE = 0.05


def zeros_of(weight: torch.Tensor) -> torch.Tensor | None:
    """Return which weights of a pruned layer are zero, bool [out, in].

    None if hardly any is, and if all are: that is a layer of a new student.
    """
    zero = weight == 0
    return zero if PRUNED_SHARE <= float(zero.float().mean()) < 1 else None


class LinearsMethod(Method):
    """A method that changes or replaces linear layers."""

    skip: tuple[str, ...] = ()
    """Layers to leave unchanged, as shell-style patterns of their names, such as "*.output.dense"."""
    head: bool = False
    """Whether the linear layers of NV-Embed's folded head are included; they hold 3 % of NV-Embed-v2's weights and are used once
    per token."""

    def overriding(self) -> Mapping[str, StepOverride]:
        """Return the settings that the config gives some layers in the place of its own, by pattern of their names."""
        return {}

    def chosen(self, names: Iterable[str]) -> list[str]:
        """Return those names of linear layers that the method works on."""
        names = list(names)
        left = matching(names, self.skip)
        return [name for name in names if name not in left]

    def linears_in(self, parts: Parts) -> dict[str, nn.Linear]:
        """Return the linear layers of a segment that the method works on, by name.

        Raises:
            ValueError: a weight is NaN or infinite, or a layer that multiplies by a matrix is not an `nn.Linear`.
        """
        import torch
        from torch import nn

        from compress.layers.compressed import CompressedLayer

        found: dict[str, nn.Linear] = {}
        others: dict[str, str] = {}
        for path, part in parts.items():
            for inner, module in part.named_modules():
                name = f"{path}.{inner}"
                if isinstance(module, nn.Linear) and (
                    is_block_linear(f"{name}.weight", module.weight.dim()) or (self.head and is_head_linear(f"{name}.weight"))
                ):
                    found[name] = module
                    continue
                weight = getattr(module, "weight", None)
                own = isinstance(weight, nn.Parameter) and not isinstance(module, CompressedLayer | nn.Linear)
                if own and is_block_linear(f"{name}.weight", weight.dim()):  # type: ignore[union-attr]
                    others[name] = type(module).__name__
        for name in self.chosen(others):
            raise ValueError(f"{name} is a {others[name]}, not an nn.Linear; {self.method} does not change it: name it in `skip`")
        chosen = {name: found[name] for name in self.chosen(found)}
        for name, linear in chosen.items():
            if not torch.isfinite(linear.weight).all():
                raise ValueError(f"{name}.weight holds NaN or infinity; {self.method} left it unchanged")
        return chosen

    def statistics_of(
        self,
        parts: Parts,
        linears: Mapping[str, nn.Linear],
        inputs: Inputs | None,
        make: Callable[[int, torch.device], S],
        *,
        pooled_only: bool = False,
    ) -> Iterator[tuple[tuple[str, ...], S]]:
        """Yield a statistic of each input on the calibration texts, with the names of the layers that share this input.

        Args:
            parts: the segment's modules.
            linears: the layers, by name.
            inputs: the calibration texts as they arrive at the segment.
            make: makes an empty statistic, given the input's width and device.
            pooled_only: see `Inputs.see`.
        """
        assert inputs is not None, f"{self.method} calibrates, so the walk gives it the inputs of segments with linear layers"
        groups, statistics = inputs.gather(parts, linears, make, pooled_only=pooled_only)
        for leader, names in groups.items():
            yield names, statistics.pop(leader)

    def work_bytes(self, linears: list[TensorInfo]) -> int:
        """Return the bytes of memory that the method takes in addition to copies of the largest weight."""
        return 0

    def work_flops(self, linears: list[TensorInfo]) -> float:
        """Return the operations in addition to passes over the weights and running the calibration texts."""
        return 0.0

    def linears_of(self, shape: ModelShape) -> tuple[dict[str, TensorInfo], list[str]]:
        """Return a shape's linear layers, by name, and the names of those that the method works on.

        Raises:
            ValueError: a pattern matches no layer, there is no folded head, no layer is left, the layers are stored transposed, or
                an override has no effect, because `skip` leaves out every layer that it matches.
        """
        if shape.setting("model_type") in TRANSPOSED:
            raise ValueError(
                f"{shape.name}: its blocks have Conv1D layers, with weights stored [in, out]; {self.method} takes only nn.Linear"
            )
        linears = {**shape.block_linears, **(shape.head_linears if self.head else {})}
        check_patterns(linears, (*self.skip, *self.overriding()))
        chosen = self.chosen(linears)
        if self.head and not shape.head_linears:
            raise ValueError(f"{shape.name} has no folded latent-attention head; leave `head` out")
        if not chosen:
            raise ValueError(f"{shape.name} has no linear layer left for {self.method}")
        for pattern in self.overriding():
            if not matching(chosen, [pattern]):
                raise ValueError(f"overrides {pattern!r} has no effect: `skip` leaves out every layer that it matches")
        return linears, chosen
