"""How a layer is stored and multiplied: the terms that variants, methods and runtimes share. No torch here."""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from pydantic import BaseModel, ConfigDict, Field


class ActivationScheme(StrEnum):
    """How the input of a quantized layer becomes 8-bit numbers at run time.

    A variant stores its weights and a scheme per layer; a runtime declares the schemes that it executes. `NONE` leaves activations
    in floating point (weight-only quantization). The dynamic schemes use the absolute maximum of a row, of the whole tensor, or of
    a row's group of inputs at run time; the static scheme uses a scale from calibration.
    """

    NONE = "none"
    STATIC_PER_TENSOR = "static_per_tensor"
    DYNAMIC_PER_TENSOR = "dynamic_per_tensor"
    DYNAMIC_PER_TOKEN = "dynamic_per_token"
    DYNAMIC_PER_GROUP = "dynamic_per_group"
    """One scale per token and group of inputs; the groups are those of the weight."""


class Numbers(StrEnum):
    """Number format of a stored weight."""

    INTEGER = "int"
    FLOAT8 = "fp8"
    """E4M3: 4 bits of exponent, 3 of mantissa, largest value 448 (Micikevicius et al. 2022, arXiv 2209.05433)."""
    LLM_INT8 = "llm-int8"
    NF4 = "nf4"
    FP4 = "fp4"
    MXFP4 = "mxfp4"
    """E2M1 with a power of two for each group of 32 (OCP Microscaling Formats specification 1.0, sections 5.3.3 and 5.4.1)."""
    NVFP4 = "nvfp4"
    """E2M1 with an E4M3 scale for each group of 16 and a float32 scale for the whole weight (NVIDIA 2025, arXiv 2509.25149)."""


BLOCK = 64
"""Number of weights that share a scale in NF4 and FP4."""
NESTED_BLOCK = 256
"""Number of scales that share a second scale (double quantization: Dettmers et al. 2023, QLoRA, arXiv 2305.14314, section 3)."""

FLOAT4_GROUPS: Mapping[Numbers, int] = MappingProxyType({Numbers.MXFP4: 32, Numbers.NVFP4: 16})
"""Formats of four-bit floating point that this project multiplies itself, and how many of their weights share a scale."""


class QuantizedLayer(BaseModel):
    """How one linear layer or embedding table is stored and multiplied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    numbers: Numbers = Numbers.INTEGER
    bits: int = Field(ge=2, le=8)
    group_size: int | None = Field(None, ge=1)
    """Number of inputs that share a scale; None: all inputs of an output channel (of a table: of a row)."""
    symmetric: bool = True
    """Whether zero is the middle of the integer range; otherwise each group stores its own zero."""
    activations: ActivationScheme = ActivationScheme.NONE
    input_factor: bool = False
    """Whether the input is divided by a stored vector, channel by channel, before the product."""

    @property
    def name(self) -> str:
        """Short name of the number format: `int8`, `int4-g64`, `fp8`."""
        if self.numbers is not Numbers.INTEGER:
            return str(self.numbers)
        return f"int{self.bits}" + (f"-g{self.group_size}" if self.group_size else "")
