"""Every Triton kernel compiles for cards, without a card: to the integer products of the tensor cores where it multiplies."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)"),
    pytest.mark.skipif(bool(os.environ.get("TRITON_INTERPRET")), reason="this process interprets Triton"),
]
COUNTS = {"rows", "outputs", "inputs", "width", "stride", "x_stride", "groups", "group_size"}
HALF = {"x": "*bf16", "y": "*bf16", "weight": "*bf16", "bias": "*bf16", "scales": "*fp32", "scale": "*fp16", "zero": "*u8"}
PRODUCT = {"y": "*bf16", "x_scale": "*fp32", "weight_scale": "*fp32", "bias": "*bf16"}
NORM = {"CENTRED": True, "ROUNDS_FIRST": False, "BIAS": True}
TILES = {"BLOCK_ROWS": 128, "BLOCK_OUTPUTS": 128, "BLOCK_INPUTS": 64, "INPUTS": 4096, "SCALED_ROWS": True, "BIAS": True, "GROUP": 8}
FEW = {"SIGNED": False, "ZEROS": True, "ONE_GROUP": True, "BITS": 4, "BYTES": 64}


def ptx(module: str, name: str, card: int, types: dict[str, str], constants: dict[str, Any]) -> str:
    """Compile a kernel for a card's compute capability and return its assembly; ptxas has turned it into machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"compress.layers.kernels.{module}"), name)
    kinds = dict.fromkeys(COUNTS, "i32") | {"eps": "fp32", "offset": "fp32"} | types
    signature = {argument: "constexpr" if argument in constants else kinds[argument] for argument in kernel.arg_names}
    pointers = (place for place, kind in enumerate(signature.values()) if kind.startswith("*"))
    source = ASTSource(kernel, signature, constants, {(place,): [["tt.divisibility", 16]] for place in pointers})
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options={"num_warps": 4, "num_stages": 2})
    assert len(compiled.asm["cubin"])
    return str(compiled.asm["ptx"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(("card", "rounds", "values"), [(80, 1, "*i8"), (90, 2, "*fp8e4nv")])
def test_row_kernels_compile(card: int, rounds: int, values: str) -> None:
    types = HALF | {"values": values}
    constants = {"ROUNDS": rounds, "BLOCK": 1024}
    for name in ("_quantize", "_gated"):
        ptx("rows", name, card, types, constants)
    assert "rsqrt" in ptx("rows", "_normalize", card, types, constants | NORM)


@pytest.mark.parametrize(("card", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_int8_products_use_the_tensor_cores(card: int, instruction: str) -> None:
    types = PRODUCT | {"x": "*i8", "weight": "*i8"}
    assembly = ptx("products", "_product", card, types, TILES | {"WHOLE": True})
    assert any(instruction in line and ".s8.s8" in line for line in assembly.splitlines())


def test_int8_products_by_the_tensor_memory_accelerator() -> None:
    types = PRODUCT | {"x": "tensordesc<i8[128,64]>", "weight": "tensordesc<i8[128,64]>"}
    assembly = ptx("products", "_product_by_descriptor", 90, types, TILES)
    assert "cp.async.bulk.tensor" in assembly
    assert "wgmma.mma_async" in assembly


@pytest.mark.parametrize("card", [80, 90])
def test_products_of_packed_weights_compile(card: int) -> None:
    types = HALF | {"values": "*u8"}
    few = ptx("weights", "_few", card, types, FEW | {"BIAS": True, "BLOCK_ROWS": 16, "BLOCK_OUTPUTS": 16, "width": 2048})
    assert "mma" in few
    ptx("weights", "_unpack", card, types, FEW | {"BLOCK_OUTPUTS": 32})
