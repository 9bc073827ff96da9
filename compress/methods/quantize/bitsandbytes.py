"""LLM.int8(), NF4 and FP4 by the bitsandbytes package: what most people try first, here for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from compress.layers.scheme import BLOCK, ActivationScheme, Numbers, QuantizedLayer
from compress.methods.quantize.base import QuantizeLinears

if TYPE_CHECKING:
    from torch import nn

    from compress.calibration.inputs import Inputs
    from compress.layers.compressed import CompressedLayer
    from compress.models.network.segments import Parts


class BitsAndBytes(QuantizeLinears):
    """Quantize linear layers with bitsandbytes.

    `llm-int8`: Dettmers et al. 2022, arXiv 2208.07339. `nf4` and `fp4`: blocks of 64 weights whose scales are quantized too;
    Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3. NV-Embed's latent-attention head is left unchanged unless `head` is
    set.
    """

    method: Literal["bitsandbytes"] = "bitsandbytes"
    format: Literal["nf4", "fp4", "llm-int8"] = "nf4"
    """Number format of the weights."""

    def numbers_of(self, name: str) -> QuantizedLayer:
        """Return the step's number format."""
        if self.format == "llm-int8":
            return QuantizedLayer(numbers=Numbers.LLM_INT8, bits=8, activations=ActivationScheme.DYNAMIC_PER_TOKEN)
        return QuantizedLayer(numbers=Numbers(self.format), bits=4, group_size=BLOCK)

    def quantize(self, parts: Parts, linears: dict[str, nn.Linear], inputs: Inputs | None) -> Iterator[tuple[str, CompressedLayer]]:
        """See `QuantizeLinears.quantize`.

        Raises:
            UserError: the package is not installed.
        """
        from compress.layers.bitsandbytes_linear import BitsAndBytes4BitLinear, BitsAndBytesInt8Linear

        for name, linear in linears.items():
            wanted = self.numbers_of(name)
            if wanted.numbers is Numbers.LLM_INT8:
                yield name, BitsAndBytesInt8Linear.from_float(linear, wanted)
            else:
                yield name, BitsAndBytes4BitLinear.from_float(linear, wanted.numbers)
