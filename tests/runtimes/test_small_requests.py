"""Graphs for single short texts, with a stand-in for the graph: buckets, their filling, and what happens where no graph is for a text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import compress
from compress.models.network.packed import prepared
from compress.models.text.packed import pack
from compress.runtimes.small_requests import Replay, SmallRequests, bucket_of, filled
from compress.runtimes.torch_embedder import TorchEmbedder

PROMPT = "find the answer: "
TEXTS = ["a parcel", "who wrote it?", "a", "rain by the evening, they said, and more of it in the night"]
Run = Callable[[], torch.Tensor]


class StandIn:
    """Records like a graph: replaying does the same on what the fixed tensors then hold, and writes to the same result."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, run: Run) -> tuple[Replay, torch.Tensor]:
        self.recorded += 1
        output = run()

        def replay() -> None:
            self.replayed += 1
            output.copy_(run())

        return replay, output


def opened(folder: Path, capture: Callable[[Run], tuple[Replay, torch.Tensor]], buckets: tuple[int, ...]) -> TorchEmbedder:
    embedder = compress.load(str(folder), device="cpu", batching="packed")
    assert isinstance(embedder, TorchEmbedder)
    embedder._small = SmallRequests(embedder.model, embedder.device, capture, buckets)
    return embedder


def test_the_smallest_bucket_that_holds_a_text_is_taken() -> None:
    assert [bucket_of(tokens, (8, 16, 32)) for tokens in (1, 8, 9, 16, 32, 33)] == [8, 8, 16, 16, 32, None]


def test_a_bucket_is_filled_by_a_text_of_its_own() -> None:
    made = filled(prepared(pack([np.array([5, 6, 7])]), torch.nn.Module(), 1), 8)
    assert made.ids.tolist() == [[5, 6, 7, 0, 0, 0, 0, 0]]
    assert made.positions.tolist() == [[0, 1, 2, 0, 0, 0, 0, 0]]
    assert made.rows.text.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert made.rows.offsets.tolist() == [0, 3, 8]
    assert made.rows.offsets.dtype == torch.int32
    assert (made.rows.first.tolist(), made.rows.stop.tolist()) == ([1, 3], [3, 8])


def test_buckets_longer_than_the_table_of_positions_do(make_model: Callable[..., Path]) -> None:
    for kind in ("bert", "roberta"):  # 66 positions
        folder = make_model(kind)
        small = opened(folder, StandIn(), (128,))
        expected = compress.load(str(folder), device="cpu").encode(TEXTS)
        for text, vector in zip(TEXTS, expected, strict=True):
            np.testing.assert_allclose(small.encode([text])[0], vector, atol=1e-5)
        assert small.small_requests == "CUDA graphs of up to 128 tokens"


@pytest.mark.parametrize("kind", ["bert", "mistral", "gemma3_text"])
def test_vectors_are_those_without_graphs(make_model: Callable[..., Path], kind: str) -> None:
    folder = make_model(kind, normalize=False, prompts={"query": PROMPT}, include_prompt=False)
    stand_in = StandIn()
    usual = compress.load(str(folder), device="cpu", batching="packed")
    small = opened(folder, stand_in, (16, 32))
    for text in [*TEXTS, *TEXTS]:
        for prompt in ("", PROMPT):
            np.testing.assert_allclose(small.encode([text], prompt), usual.encode([text], prompt), atol=1e-5)
    assert stand_in.recorded == 2, "one graph a bucket"
    assert stand_in.replayed == 2 + 16, "each is checked once, then every text is run by one"
    assert small.small_requests == "CUDA graphs of up to 16, 32 tokens"


def test_larger_requests_run_without_a_graph(bert: Path) -> None:
    stand_in = StandIn()
    small = opened(bert, stand_in, (4, 8))
    usual = compress.load(str(bert), device="cpu")
    for texts in ([TEXTS[3]], TEXTS, ["a"] * 2):
        np.testing.assert_allclose(small.encode(texts), usual.encode(texts), atol=1e-5)
    assert stand_in.recorded == 0


def test_a_prompt_without_a_text_takes_no_graph(make_model: Callable[..., Path]) -> None:
    folder = make_model("bert", prompts={"query": PROMPT}, include_prompt=False)
    stand_in = StandIn()
    small = opened(folder, stand_in, (32,))
    row = small.tokenizer([PROMPT])[0][:3]
    assert (small.embed([row], 32, 5, False) == 0).all()
    assert stand_in.recorded == 0
    assert small.small_requests.startswith("CUDA graphs")


def test_what_cannot_be_recorded_runs_as_it_is_and_says_so(bert: Path) -> None:
    asked = []

    def capture(run: Run) -> tuple[Replay, torch.Tensor]:
        asked.append(run)
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    small = opened(bert, capture, (64,))
    expected = compress.load(str(bert), device="cpu").encode(TEXTS)
    for text, vector in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(small.encode([text])[0], vector, atol=1e-5)
    assert len(asked) == 1
    assert small.small_requests == "as it is: no CUDA graph (operation not permitted when stream is capturing)"


@pytest.mark.parametrize("broken", ["nothing is replayed", "what is given is not read"])
def test_a_graph_that_gives_other_vectors_is_not_used(bert: Path, broken: str) -> None:
    def capture(run: Run) -> tuple[Replay, torch.Tensor]:
        output = run()
        recorded = output.clone()

        def replay() -> None:
            if broken != "nothing is replayed":
                output.copy_(recorded)

        return replay, output

    small = opened(bert, capture, (64,))
    expected = compress.load(str(bert), device="cpu").encode(TEXTS[:1])
    np.testing.assert_allclose(small.encode(TEXTS[:1]), expected, atol=1e-5)
    assert "its vectors differ" in small.small_requests
