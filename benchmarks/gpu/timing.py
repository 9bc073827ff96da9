"""Times calls on a device, in turn, and multiplies large matrices to know what the card can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    """Time a call until the device has finished it: on CUDA by events."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@torch.inference_mode()
def in_turn(calls: Mapping[str, Call], device: torch.device, rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time calls in turn, round by round, so that a card that slows down slows all of them; warm-up rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + warm_up):
        for name, call in calls.items():
            taken = seconds(call, device)
            if turn >= warm_up:
                times[name].append(taken)
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """Return the median of how many times faster `fast` was in the rounds."""
    return median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def percentile(values: list[float], share: float) -> float:
    """Return the value below which a share of the values lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def peak_rates(device: torch.device, size: int, rounds: int) -> dict[str, float | str]:
    """Measure the operations per second of a square product, in each precision that the device multiplies; else why not."""
    rates: dict[str, float | str] = {}
    plain = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=plain) for _ in range(2))
    small, other = ((x * 16).to(torch.int8) for x in (a, b))
    products: dict[str, Call] = {str(plain).removeprefix("torch."): lambda: a @ b, "int8": lambda: torch._int_mm(small, other.t())}
    if device.type == "cuda":
        one = torch.ones((), device=device)
        x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        products["fp8"] = lambda: torch._scaled_mm(
            x, y.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )
    for name, call in products.items():
        try:
            rates[name] = 2 * size**3 / median(in_turn({name: call}, device, rounds)[name])
        except (RuntimeError, ValueError) as error:  # torch raises either, by version
            rates[name] = f"not on this device: {str(error).splitlines()[0][:120]}"
    return rates
