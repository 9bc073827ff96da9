"""Times of layers: what is timed is the layer, in each runtime, and a bound on speed is kept by these times."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from search_support import FEW

from compress.layers.scheme import ActivationScheme, QuantizedLayer
from compress.runtimes.contract import GRAPH_RUNTIMES, RUNTIMES
from compress.runtimes.lower import lower_layer
from compress.search import timing
from compress.search.budget import Bounds, SearchOptions, search
from compress.search.sensitivity import Subject

KINDS = {
    "float": None,
    "int8": QuantizedLayer(bits=8),
    "int4-g16": QuantizedLayer(bits=4, group_size=16, symmetric=False),
    "static": QuantizedLayer(bits=8, activations=ActivationScheme.STATIC_PER_TENSOR),
}


@pytest.mark.parametrize("runtime", GRAPH_RUNTIMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_of_a_layer_alone_is_that_layer(tmp_path: Path, runtime: str, kind: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    stored = KINDS[kind]
    if stored is not None and RUNTIMES[runtime].overflows(stored):
        pytest.skip("byte products overflow on this CPU")
    layer, rows = timing._layer_of((24, 32), stored), timing._rows(32)[:3]
    run = importlib.import_module(RUNTIMES[runtime].opener).open_graph(lower_layer(layer, tmp_path, runtime), 1)
    np.testing.assert_allclose(run(rows.numpy()), layer(rows).detach().numpy(), atol=2e-3)


def by_size(shape: tuple[int, ...], kind: QuantizedLayer | None) -> float:
    """Milliseconds that a layer would take if they were its bits."""
    return shape[0] * shape[1] * (32 if kind is None else kind.bits) / 1e3


@pytest.fixture
def bits_for_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_layer_ms", by_size)
    monkeypatch.setattr(timing, "_graph_layer_ms", lambda runtime, threads, streams, shape, kind: by_size(shape, kind))
    monkeypatch.setattr(timing, "_model_ms", lambda subject: 2_000.0)
    monkeypatch.setattr(timing, "_timed", lambda call: call() is not None and 2_000.0)
    monkeypatch.setattr(timing, "threads_and_streams", lambda folder, threads: (2, 1))


@pytest.mark.parametrize("runtime", ["torch", *(pytest.param(runtime, marks=pytest.mark.slow) for runtime in GRAPH_RUNTIMES)])
@pytest.mark.usefixtures("bits_for_times")
def test_a_bound_on_speed_is_kept_by_the_times_of_the_runtime(bert: Path, runtime: str) -> None:
    pytest.importorskip(runtime, reason=f"{runtime} is not installed")
    options = replace(FEW, choices=("int8", "int4", "channels-50", "dropped"), runtime=runtime)
    subject = Subject(str(bert), options)
    found = search(
        str(bert), Bounds(min_speedup=2.0), SearchOptions(scoring=options, trials=0, candidates=1, points=2), say=lambda _: None
    )
    ms = 0.0
    for group in subject.choices:
        if group.kind in ("table", "block") or found.why["chosen"].get(f"{group.block}.block") == "dropped":
            continue
        for layer in group.layers:
            rows, columns = subject.shape.block_linears[layer].shape
            narrow = found.why["chosen"][f"{group.block}.block"] == "channels-50" and group.kind in ("up", "down")
            bits = {"float16": 32, "int8": 8, "int4": 4}[found.why["chosen"][group.name]]
            ms += rows * columns * bits / 1e3 / (2 if narrow else 1)
    dense = sum(32 * info.parameters for info in subject.shape.block_linears.values()) / 1e3
    dropped = sum(choice == "dropped" for choice in found.why["chosen"].values())
    assert ms + (2_000 - dense) * (1 - dropped / 2) <= 1_000 * (1 + 1e-6)
    assert found.recipe.runtime == runtime


@pytest.mark.usefixtures("bits_for_times")
def test_groups_of_narrower_blocks_have_times_of_their_own(bert: Path) -> None:
    subject = Subject(str(bert), replace(FEW, choices=("int8", "channels-50", "heads-50")))
    found = timing.milliseconds(subject, lambda: pytest.fail("torch needs no graph"))
    for group, narrower in (("0.up", "channels-50"), ("0.down", "channels-50"), ("0.qkv", "heads-50"), ("0.o", "heads-50")):
        assert found[f"{group} of {narrower}"]["int8"] == pytest.approx(found[group]["int8"] / 2)
        assert found[group]["float16"] == pytest.approx(4 * found[group]["int8"])
    assert "0.up of heads-50" not in found
    assert found[""] == {"float32": 2_000.0, "float16": 2_000.0}
