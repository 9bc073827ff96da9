"""Triton kernels. They run on CUDA, and on the CPU in Triton's interpreter (`TRITON_INTERPRET=1` before the first import).

Triton is optional: no module outside of this package imports `rows`, `products` or `weights` before `available` has said yes.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from contextlib import AbstractContextManager, nullcontext

import torch

UNFIT = (RuntimeError, ValueError, AttributeError, OSError, subprocess.SubprocessError)
"""What an operator raises that a device or a build lacks. The last two: Triton compiles its launcher with a C compiler, which may
be missing or find no headers of Python."""


@functools.cache
def available(device_type: str) -> bool:
    """Whether Triton is installed and compiles for, or interprets on, this type of device."""
    if device_type not in ("cuda", "cpu") or importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    # Triton wraps functions at their definition, for the compiler or for the interpreter; a process has one of the two.
    return bool(knobs.runtime.interpret) == (device_type == "cpu")


def failures() -> tuple[type[Exception], ...]:
    """Return what a kernel raises that this device or this version of Triton cannot run."""
    if importlib.util.find_spec("triton") is None:
        return UNFIT
    from triton.errors import TritonError

    return (*UNFIT, TritonError)


def launching_on(x: torch.Tensor) -> AbstractContextManager[object]:
    """Make the card of `x` the current one: Triton launches kernels there, whatever card their tensors are on."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()
