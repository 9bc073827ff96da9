"""Activation schemes: the half of a variant's arithmetic that is not in its weights. No torch here."""

from enum import StrEnum


class ActivationScheme(StrEnum):
    """How the input of a quantized layer is turned into int8 at run time.

    A variant stores weights and one of these; a runtime declares which it executes. `NONE` leaves activations in floating
    point (weight-only quantization). The dynamic schemes take the absolute maximum of a row or of the whole tensor while running;
    the static one uses a scale that calibration found.
    """

    NONE = "none"
    STATIC_PER_TENSOR = "static_per_tensor"
    DYNAMIC_PER_TENSOR = "dynamic_per_tensor"
    DYNAMIC_PER_TOKEN = "dynamic_per_token"
