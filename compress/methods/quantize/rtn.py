"""Round to nearest: each weight becomes the int8 nearest to it. No calibration, seconds even for large models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.layers.scheme import ActivationScheme
from compress.methods.base import Estimate, Method
from compress.models.checkpoint import TensorInfo
from compress.models.shape import ModelShape, check_patterns, is_block_linear, matching
from compress.models.variant import QuantizedLayer

if TYPE_CHECKING:
    from compress.models.segments import Parts


class RTN(Method):
    """Round the linear layers of the blocks to int8, symmetric, one scale per output channel.

    With activations `dynamic_per_token` this is the W8A8 arithmetic of LLM.int8() without its outlier columns (Dettmers et al.
    2022, arXiv 2208.07339, section 2.1: row-wise times column-wise scales).
    """

    method: Literal["rtn"] = "rtn"
    bits: Literal[8] = 8
    """Bits of a weight."""
    activations: Literal["none", "dynamic_per_tensor", "dynamic_per_token"] = "dynamic_per_token"
    """What the layer's input becomes: nothing (weights alone are quantized; smaller, not faster), or int8 with one scale per
    tensor or per token."""
    skip: tuple[str, ...] = ()
    """Layers left alone: shell-style patterns of their names, such as "*.output.dense"."""

    def estimate(self, shape: ModelShape) -> Estimate:
        """Size after: one byte a weight and four bytes an output channel; everything else in half precision.

        Raises:
            ValueError: a pattern of `skip` matches no linear layer.
        """
        linears = shape.block_linears
        check_patterns(linears, self.skip)
        chosen = linears.keys() - matching(linears, self.skip)
        weights = sum(linears[name].parameters for name in chosen)
        largest = max((linears[name].parameters for name in chosen), default=0)
        tensors = dict(shape.as_stored().tensors)
        for name in chosen:
            tensors[f"{name}.weight"] = TensorInfo("I8", linears[name].shape)
            tensors[f"{name}.weight_scale"] = TensorInfo("F32", linears[name].shape[:1])
        return Estimate(
            after=ModelShape(shape.name, tensors, shape.config),
            memory_bytes=largest * (4 + 4 + 1),  # a float32 copy, its rounded copy, the integers
            bytes_touched=weights * (4 + 4 + 1),
            note=f"{len(chosen)} linear layers, {weights / 1e6:,.1f} M weights to int8, activations {self.activations}",
        )

    def apply(self, parts: Parts) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by a `QuantizedLinear`.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        import torch
        from torch import nn

        from compress.layers.quantized_linear import QuantizedLinear

        scheme = ActivationScheme(self.activations)
        quantized = {}
        for path, part in parts.items():
            linears = {
                f"{path}.{name}": (name, module)
                for name, module in part.named_modules()
                if isinstance(module, nn.Linear) and is_block_linear(f"{path}.{name}.weight", module.weight.dim())
            }
            for layer in sorted(linears.keys() - matching(linears, self.skip)):
                name, linear = linears[layer]
                if not torch.isfinite(linear.weight).all():
                    raise ValueError(f"{layer}.weight holds NaN or infinity; it was not quantized")
                part.set_submodule(name, QuantizedLinear.from_float(linear, scheme))
                quantized[layer] = QuantizedLayer(bits=self.bits, activations=scheme)
        return quantized
