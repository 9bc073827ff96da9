"""LLM.int8(), NF4 and FP4 as the bitsandbytes package does them: what most people try first, here to be compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compress.layers.scheme import BLOCK, ActivationScheme, Numbers, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears
from compress.models.network.segments import replace_module

if TYPE_CHECKING:
    from compress.calibration.inputs import Inputs
    from compress.models.network.segments import Parts


class BitsAndBytes(QuantizeLinears):
    """Quantize linear layers with bitsandbytes.

    `llm-int8`: Dettmers et al. 2022, arXiv 2208.07339. `nf4` and `fp4`: blocks of 64 weights, their scales quantized too; Dettmers
    et al. 2023 (QLoRA), arXiv 2305.14314, section 3. NV-Embed's latent head is left alone, folded or not, unless `head` is set.
    """

    method: Literal["bitsandbytes"] = "bitsandbytes"
    format: Literal["nf4", "fp4", "llm-int8"] = "nf4"
    """Numbers of the weights."""

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's numbers."""
        if self.format == "llm-int8":
            return QuantizedLayer(numbers=Numbers.LLM_INT8, bits=8, activations=ActivationScheme.DYNAMIC_PER_TOKEN)
        return QuantizedLayer(numbers=Numbers(self.format), bits=4, group_size=BLOCK)

    def apply(self, parts: Parts, inputs: Inputs | None = None) -> dict[str, QuantizedLayer]:
        """Replace every chosen `nn.Linear` of a segment by one of the package's making.

        Raises:
            ValueError: a weight is NaN or infinite.
            UserError: the package is not installed.
        """
        from compress.layers.bitsandbytes_linear import BitsAndBytes4BitLinear, BitsAndBytesInt8Linear
        from compress.layers.compressed import CompressedLayer

        quantized = {}
        for name, linear in self.linears_in(parts).items():
            wanted = self.numbers_of(name)
            layer: CompressedLayer
            if wanted.numbers is Numbers.LLM_INT8:
                layer = BitsAndBytesInt8Linear.from_float(linear, wanted)
            else:
                layer = BitsAndBytes4BitLinear.from_float(linear, wanted.numbers)
            replace_module(parts, name, layer)
            quantized[name] = layer.layer
        return quantized
