"""Networks that threads build at the same time: each is whole, and modules of other threads are left alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

import numpy as np
import torch
from tests_support import TEXTS, folder_of
from torch import nn

import compress
from compress.models.network.build import empty_network


def test_threads_build_whole_networks_and_change_no_other_s(bert: Path, make_model: Callable[[str], Path]) -> None:
    other = make_model("mistral")
    expected = {path: compress.load(str(path), device="cpu").encode(TEXTS) for path in (bert, other)}
    together, built = Barrier(3), Event()

    def build(path: Path) -> bool:
        together.wait()
        networks = [empty_network(folder_of(path)) for _ in range(12)]
        assert all(parameter.is_meta for network in networks for parameter in network.parameters())
        assert not any(buffer.is_meta for network in networks for buffer in network.buffers())
        return np.array_equal(compress.load(str(path), device="cpu").encode(TEXTS), expected[path])

    def make_others() -> int:
        together.wait()
        made = 0
        while not built.is_set():
            assert nn.Linear(2, 2).weight.device == torch.device("cpu")
            made += 1
        return made

    with ThreadPoolExecutor(3) as threads:
        others = threads.submit(make_others)
        builds = [threads.submit(build, path) for path in (bert, other)]
        try:
            assert all(found.result() for found in builds)
        finally:
            built.set()
        assert others.result() > 0
    assert nn.Linear(2, 2).weight.device == torch.device("cpu")
