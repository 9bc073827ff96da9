"""Packed batches give the vectors of padded ones, or the network stays padded and says why."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests_support import compress_to

import compress
from compress.common.errors import UserError
from compress.methods.nv_embed.fold import Fold
from compress.models.network import packed as packed_module
from compress.models.network.packed import IMPLEMENTATION, attend
from compress.models.network.pooling import POOLINGS, PackedRows, TokenPooling
from compress.models.text.packed import consecutive, pack
from compress.models.text.spec import Pooling
from compress.runtimes.contract import LEAST_PACKED_TOKENS, MOST_PACKED_TOKENS, packed_budget
from compress.runtimes.torch_embedder import TorchEmbedder

PROMPTS = {"query": "find the answer to this question: "}
MIXED = [
    "the parcel never came",
    "a",
    "",
    "rain by the evening, they said, and then a much longer text about everything that the rain did to the town below the hill",
    "who wrote it?",
    "x y z",
    "once more, with words enough to pass any of the tiny sliding windows of these networks, on both of their sides",
]
PACKABLE = ["bert", "roberta", "distilbert", "mistral", "llama", "qwen2", "qwen3", "modernbert", "gemma3_text"]


def both(folder: Path, **how: Any) -> tuple[TorchEmbedder, TorchEmbedder]:
    """Open a model padded and packed, in float32."""
    opened = [compress.load(str(folder), device="cpu", dtype="float32", batching=way, **how) for way in ("padded", "packed")]
    assert [embedder.batching for embedder in opened] == ["padded", "packed"]
    return opened[0], opened[1]


@pytest.mark.parametrize("kind", PACKABLE)
def test_packed_vectors_are_the_padded_ones(make_model: Callable[..., Path], kind: str) -> None:
    padded, packed = both(make_model(kind, normalize=False, prompts=PROMPTS, include_prompt=False))
    for texts in (MIXED, MIXED[:1], ["a"], ["a"] * 3):
        for prompt in ("", PROMPTS["query"]):
            expected = padded.encode(texts, prompt)
            assert np.abs(expected).max() > 0.1, "vectors of zeros would agree whatever is done"
            np.testing.assert_allclose(packed.encode(texts, prompt), expected, atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(packed.encode(texts, prompt, batch_tokens=20), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"is_causal": False}),
        ("mistral", {"is_causal": False, "sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
        ("gemma3_text", {"use_bidirectional_attention": True}),
        ("qwen2", {"is_causal": False}),
    ],
    ids=str,
)
def test_masks_that_a_config_asks_for_are_kept(
    make_model: Callable[..., Path], copy_of: Callable[[Path], Path], kind: str, changes: dict[str, Any]
) -> None:
    folder = copy_of(make_model(kind, normalize=False))
    config = json.loads((folder / "config.json").read_text())
    usual = compress.load(str(folder), device="cpu", dtype="float32").encode(MIXED)
    (folder / "config.json").write_text(json.dumps(config | changes))
    padded, packed = both(folder)
    expected = padded.encode(MIXED)
    assert np.abs(expected - usual).max() > 1e-3, "the change does something"
    np.testing.assert_allclose(packed.encode(MIXED), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_nv_embed_packs_with_its_prompts_left_out(nv_embed: Path, tmp_path: Path, folded: bool) -> None:
    folder = nv_embed
    if folded:
        compress_to(nv_embed, tmp_path / "folded", Fold())
        folder = tmp_path / "folded"
    padded, packed = both(folder)
    texts = [text for text in MIXED if text]
    prompt = "Instruct: find the answer\nQuery: "
    for asked in ("", prompt):
        np.testing.assert_allclose(packed.encode(texts, asked), padded.encode(texts, asked), atol=1e-5)
    assert np.abs(packed.encode(texts, prompt) - packed.encode([prompt + text for text in texts])).max() > 1e-3


@pytest.mark.parametrize("mode", list(POOLINGS))
def test_each_pooling_is_the_same_on_rows_end_to_end(mode: Pooling) -> None:
    torch.manual_seed(0)
    lengths, pool_from, longest = [5, 1, 3, 7], 2, 7
    hidden = torch.randn(4, longest, 6)
    tokens = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    pooled = tokens * (torch.arange(longest) >= pool_from)
    pooling = TokenPooling((mode, Pooling.MAX))
    expected = pooling(hidden, tokens, pooled)
    assert (expected[1] == 0).all(), "nothing is pooled of the text of one token"
    batch = pack([np.zeros(length, dtype=np.int64) for length in lengths])
    starts = torch.from_numpy(batch.offsets[:-1]).long()
    rows = PackedRows(
        text=torch.arange(4).repeat_interleave(torch.tensor(lengths)),
        positions=torch.from_numpy(batch.positions),
        offsets=torch.from_numpy(batch.offsets),
        first=starts + pool_from,
        stop=starts + torch.tensor(lengths),
    )
    torch.testing.assert_close(pooling.packed(hidden[tokens.bool()], rows), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("kind", "why"), [("t5", ""), ("mpnet", "adds terms"), ("deberta-v2", "adds terms")])
def test_networks_with_additive_biases_stay_padded(make_model: Callable[..., Path], kind: str, why: str) -> None:
    folder = make_model(kind)
    with pytest.raises(UserError, match=f"cannot run packed batches: .*{why}"):
        compress.load(str(folder), device="cpu", batching="packed")
    embedder = compress.load(str(folder), device="cpu")
    assert isinstance(embedder, TorchEmbedder)
    assert (embedder.batching, embedder.why_padded) == ("padded", "no kernel for packed attention on cpu in float32")
    assert embedder.encode(MIXED).shape == (len(MIXED), 48)


def test_a_broken_offset_is_seen(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    padded, packed = both(bert)
    expected = padded.encode(MIXED)
    right = packed_module.prepared

    def shifted(*arguments: Any) -> Any:
        made = right(*arguments)
        offsets = made.rows.offsets.clone()
        offsets[1] += 1  # the first text takes a token of the second
        return dataclasses.replace(made, rows=dataclasses.replace(made.rows, offsets=offsets))

    monkeypatch.setattr("compress.runtimes.torch_embedder.prepared", shifted)
    assert np.abs(packed.encode(MIXED) - expected).max() > 1e-3
    monkeypatch.setattr(packed_module, "prepared", shifted)
    with pytest.raises(UserError, match="its packed hidden states are not its padded ones"):
        compress.load(str(bert), device="cpu", batching="packed")


def test_a_network_that_loses_the_positions_stays_padded(make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model("qwen3")
    monkeypatch.setattr(packed_module, "network_positions", lambda network, ids, rows: torch.arange(len(ids)) * 3)
    with pytest.raises(UserError, match="its packed hidden states are not its padded ones"):
        compress.load(str(folder), device="cpu", batching="packed")


def test_a_packed_network_refuses_padded_batches(bert: Path) -> None:
    packed = compress.load(str(bert), device="cpu", batching="packed")
    assert packed.model.config._attn_implementation == IMPLEMENTATION
    with pytest.raises(RuntimeError, match="not given the offsets"):
        packed.hidden(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))


def test_attention_refuses_what_it_would_leave_out() -> None:
    layer, part = torch.nn.Module(), torch.randn(1, 2, 3, 8)
    given = {"cu_seq_lens_q": torch.tensor([0, 3], dtype=torch.int32), "max_length_q": 3}
    assert attend(layer, part, part, part, None, **given)[0].shape == (1, 3, 2, 8)
    for more, words in (({"position_bias": part}, "position_bias"), ({"softcap": 3.0}, "softcap"), ({"dropout": 0.1}, "at random")):
        with pytest.raises(RuntimeError, match=words):
            attend(layer, part, part, part, None, **given, **more)
    with pytest.raises(RuntimeError, match="mask of its own"):
        attend(layer, part, part, part, torch.ones(1, 1, 3, 3), **given)


def test_kernels_of_all_versions_of_torch_are_called_by_their_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    reference = packed_module._text_by_text

    def newer(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
        assert enable_gqa
        assert window_size in ((-1, 0), (-1, -1), (2, 0), (2, 2))
        reach = None if window_size[0] == -1 else window_size[0]
        return reference(q, k, v, packed_module._Call(cu_q, max_q, scale, window_size[1] == 0, reach))

    def older(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):  # type: ignore[no-untyped-def]
        assert k.shape == v.shape == q.shape
        return reference(q, k, v, packed_module._Call(cu_q, max_q, 8**-0.5, is_causal, None))

    for kernel in (newer, older):
        names = frozenset(inspect.signature(kernel).parameters)
        monkeypatch.setattr(packed_module, "_varlen_attn", lambda kernel=kernel, names=names: (kernel, names))
        for causal in (True, False):
            for reach in (None, 2):
                call = packed_module._Call(offsets, 5, 0.7, causal, reach)
                if kernel is older and reach is not None:
                    with pytest.raises(RuntimeError, match="no sliding window"):
                        packed_module._varlen(query, key, value, call)
                    continue
                made = packed_module._varlen(query, key, value, call)
                torch.testing.assert_close(made, reference(query, key, value, call), atol=1e-5, rtol=1e-5)


def test_torch_s_own_kernel_takes_the_arguments_that_it_is_given() -> None:
    found = packed_module._varlen_attn()
    assert found is not None, "the torch that is tested has it"
    assert {"cu_seq_q", "max_q"} <= found[1]
    assert found[1] & {"is_causal", "window_size"}


def test_batches_are_texts_in_their_order_within_the_budget() -> None:
    lengths = [5, 3, 2, 9, 0, 1, 30, 1]
    parts = list(consecutive(lengths, 10))
    assert [list(range(8))[part] for part in parts] == [[0, 1, 2], [3, 4], [5], [6], [7]]
    batch = pack([np.array([7, 8]), np.array([], dtype=np.int64), np.array([9])])
    assert batch.ids.tolist() == [7, 8, 0, 9]
    assert batch.positions.tolist() == [0, 1, 0, 0]
    assert batch.offsets.tolist() == [0, 2, 3, 4]
    assert batch.lengths.tolist() == [2, 0, 1]
    assert batch.longest == 2


def test_the_budget_follows_from_the_free_memory() -> None:
    assert packed_budget(4_000_000_000, 100_000) == 20_000
    assert packed_budget(80_000_000_000, 100_000) == MOST_PACKED_TOKENS
    assert packed_budget(1_000, 100_000) == LEAST_PACKED_TOKENS


def test_on_a_cpu_nothing_is_packed_unless_asked(bert: Path) -> None:
    embedder = compress.load(str(bert), device="cpu")
    assert embedder.batching == "padded"
    assert embedder.model.config._attn_implementation == "sdpa"
    assert embedder.small_requests == "as it is"


def test_what_cannot_be_packed_is_refused_by_name(bert: Path) -> None:
    assert compress.load(str(bert), device="cpu", stream=True).batching == "padded"
    with pytest.raises(UserError, match="streamed"):
        compress.load(str(bert), device="cpu", stream=True, batching="packed")
    with pytest.raises(UserError, match="batching 'pack' is not known") as caught:
        compress.load(str(bert), device="cpu", batching="pack")  # type: ignore[arg-type]
    assert "packed" in str(caught.value.hint)


def test_positions_pass_over_pad_tokens_as_roberta_does(make_model: Callable[..., Path]) -> None:
    padded, packed = both(make_model("roberta", normalize=False))
    # The pad token's own text in the middle of another: its row of the table of positions is the pad token's.
    texts = ["a parcel [PAD] came [PAD] late", "rain", "[PAD] at the start"]
    np.testing.assert_allclose(packed.encode(texts), padded.encode(texts), atol=1e-5)
