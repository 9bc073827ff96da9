"""The machine that measurements come from: processor, memory, GPU, package versions."""

from __future__ import annotations

import functools
import os
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from compress.common.memory import memory_bytes

INFORMATION = Path("/proc/cpuinfo")
# Instruction sets that add byte products in 32 bits. Without them, x86 adds pairs of unsigned x signed products in 16 bits, which
# overflow.
BYTE_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8")


@functools.cache
def cpu_name() -> str:
    """Return the processor's name."""
    return _field("model name") or platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Return the processor's instruction sets by their Linux names; empty where the system does not list them."""
    return frozenset((_field("flags") or "").split())


def multiplies_bytes_exactly() -> bool:
    """Whether sums of unsigned x signed byte products cannot overflow; assumed where the instruction sets are unknown."""
    return not cpu_flags() or bool(cpu_flags().intersection(BYTE_PRODUCTS))


def _field(name: str) -> str | None:
    if not INFORMATION.exists():
        return None
    found = re.search(rf"^{name}\s*:\s*(.+)$", INFORMATION.read_text(encoding="utf-8"), re.M)
    return found.group(1) if found else None


def gpu_name(device: str) -> str | None:
    """Return the name of a device's accelerator; None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_name(device))


PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "mteb",
    "sentence-transformers",
    "scikit-learn",
    "numpy",
    "onnxruntime",
    "openvino",
)


class Machine(BaseModel):
    """The machine that a measurement was made on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    """Instruction sets of the CPU that affect integer and half-precision products."""
    memory_bytes: int
    gpu: str | None
    system: str


def now() -> str:
    """Return the current time in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages in `PACKAGES`; `not installed` for those that are missing."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "not installed"
    return installed


def machine(gpu: str | None) -> Machine:
    """Describe this machine; `gpu`: name of the accelerator in use, if any."""
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        instructions=tuple(flag for flag in wanted if flag in cpu_flags()),
        memory_bytes=memory_bytes(),
        gpu=gpu,
        system=f"{platform.system()} {platform.machine()}",
    )
