"""Runs the Triton kernels' cases in Triton's interpreter, in a process of its own: it must be chosen before the first import."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.layers import float8_linear, kernels
from compress.layers.int8_matmul import OneDnnMatmul, OneDnnSplitMatmul, int8_matmul
from compress.layers.kernels import tiles
from compress.layers.kernels.choice import carry, rounded_input, row_kernels, weight_kernels
from compress.layers.scheme import Numbers

ROOT = Path(__file__).parents[2]
ARANGE, EYE, FULL = torch.arange, torch.eye, torch.full
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (Linux only)")


@needs_triton
@pytest.mark.parametrize(
    ("cases", "marked"),
    [
        *((cases, "not slow") for cases in ("cases_kernels.py", "cases_networks.py")),
        *(pytest.param(cases, "slow", marks=pytest.mark.slow) for cases in ("cases_kernels.py", "cases_networks.py")),
    ],
)
def test_kernels_equal_their_references_in_the_interpreter(cases: str, marked: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    file = Path(__file__).parent / "interpreted" / cases
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", "-m", marked, str(file)]
    if importlib.util.find_spec("xdist") is None:
        command.remove("-n0")
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert re.search(r"\d+ passed", ran.stdout)
    assert "skipped" not in ran.stdout


def test_without_the_interpreter_a_cpu_runs_no_triton() -> None:
    """Numbers of the CPU are those of its own kernels, whether or not Triton is installed."""
    if os.environ.get("TRITON_INTERPRET"):
        pytest.skip("this process interprets Triton")
    assert not kernels.available("cpu")
    assert not kernels.available("mps")
    assert row_kernels("cpu") is None
    assert weight_kernels("cpu") is None
    assert int8_matmul("cpu") is not None
    assert issubclass(int8_matmul("cpu"), OneDnnMatmul | OneDnnSplitMatmul) or not torch.backends.mkldnn.is_available()


def test_without_triton_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not kernels.available.__wrapped__("cuda")
    assert kernels.failures() == kernels.UNFIT
    # A launcher that no compiler compiles; torch's ValueError, where a card lacks an operator.
    assert issubclass(subprocess.CalledProcessError, kernels.failures())
    assert issubclass(ValueError, kernels.failures())


def test_measured_tiles_serve_their_shape_and_defaults_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = tiles.Tile(32, 64, 128, 4, 4), tiles.Tile(128, 128, 64, 8, 3, descriptors=True)
    entries = [tiles.entry("int8", 64, 6144, 4096, few), tiles.entry("int8", 16384, 6144, 4096, many)]
    monkeypatch.setattr(tiles, "_measured", lambda: entries)
    find = tiles.tile_for.__wrapped__
    assert find("int8", 64, 6144, 4096) == few
    assert find("int8", 65, 6144, 4096) == many
    assert find("int8", 10**6, 6144, 4096) == many
    assert find("int8", 64, 4096, 4096) == tiles.DEFAULTS["int8"][256]
    assert find("weights", 1, 6144, 4096) == tiles.DEFAULTS["weights"][16]
    assert find("int8", 10**6, 1, 1) == tiles.DEFAULTS["int8"][None]


def test_the_table_of_tiles_is_read_and_every_tile_is_one_that_a_product_takes() -> None:
    measured = [tiles.Tile(**entry["tile"]) for entry in tiles._measured()]
    for tile in (*measured, *(tile for table in tiles.DEFAULTS.values() for tile in table.values())):
        sizes = tile.rows, tile.outputs, tile.inputs, tile.warps
        assert all(size & (size - 1) == 0 for size in sizes)
        assert min(sizes[:3]) >= 16


def test_a_tensor_that_was_changed_is_rounded_anew() -> None:
    class Kernels:
        @staticmethod
        def quantize(x: torch.Tensor, numbers: Numbers) -> SimpleNamespace:
            return SimpleNamespace(numbers=numbers, of=x.clone())

    x = torch.ones(2, 8)
    first = Kernels.quantize(x, Numbers.INTEGER)
    carry(x, first)
    assert rounded_input(x, Numbers.INTEGER, Kernels) is first
    assert rounded_input(x, Numbers.FLOAT8, Kernels) is not first
    x.add_(1)
    assert torch.equal(rounded_input(x, Numbers.INTEGER, Kernels).of, x)


@pytest.mark.parametrize(
    ("able", "dtype", "made"),
    [
        ({torch.float16, torch.bfloat16}, torch.float16, torch.float16),
        ({torch.bfloat16}, torch.float16, torch.bfloat16),
        ({torch.float16, torch.bfloat16}, torch.bfloat16, torch.bfloat16),
        ({torch.float16, torch.bfloat16}, torch.float32, None),
        (set(), torch.float16, None),
    ],
)
def test_fp8_products_come_in_the_compute_dtype_where_the_card_has_it(able, dtype, made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8_linear, "has_float8_products", lambda device, made: made in able)
    assert float8_linear.product_dtype(torch.device("cuda"), dtype) is made


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError])
def test_a_card_without_fp8_products_says_so_by_any_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11 raises ValueError where earlier ones raised RuntimeError."""

    def product(*_: object, **__: object) -> torch.Tensor:
        raise error("Only bf16 and fp16 high precision output types are supported for row-wise scaling.")

    monkeypatch.setattr(torch, "_scaled_mm", product)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "arange", lambda *sizes, device: ARANGE(*sizes))
    monkeypatch.setattr(torch, "eye", lambda size, device: EYE(size))
    monkeypatch.setattr(torch, "full", lambda size, value, device: FULL(size, value))
    assert not float8_linear.has_float8_products.__wrapped__(torch.device("cuda"))
