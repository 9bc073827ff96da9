"""From a variant's description of a layer to the layer, with buffers on the meta device that the variant's files then fill."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from compress.layers.bitsandbytes_linear import BitsAndBytes4BitLinear, BitsAndBytesInt8Linear
from compress.layers.compressed import CompressedLayer
from compress.layers.float4_linear import Float4Linear
from compress.layers.float8_linear import Float8Linear
from compress.layers.quantized_embedding import QuantizedEmbedding
from compress.layers.quantized_linear import QuantizedLinear
from compress.layers.scheme import Numbers, QuantizedLayer

LINEAR: dict[Numbers, Callable[[nn.Linear, QuantizedLayer], CompressedLayer]] = {
    Numbers.INTEGER: QuantizedLinear.empty,
    Numbers.FLOAT8: Float8Linear.empty,
    Numbers.LLM_INT8: BitsAndBytesInt8Linear.empty,
    Numbers.NF4: BitsAndBytes4BitLinear.empty,
    Numbers.FP4: BitsAndBytes4BitLinear.empty,
    Numbers.MXFP4: Float4Linear.empty,
    Numbers.NVFP4: Float4Linear.empty,
}


def empty_layer(module: nn.Module, layer: QuantizedLayer) -> CompressedLayer:
    """Return the compressed layer that replaces a linear layer or a table of a network on the meta device.

    Raises:
        KeyError: no layer stores this kind of numbers.
    """
    if isinstance(module, nn.Embedding):
        return QuantizedEmbedding.empty(module, layer)
    assert isinstance(module, nn.Linear), f"{type(module).__name__} is neither a linear layer nor a table"
    return LINEAR[layer.numbers](module, layer)
