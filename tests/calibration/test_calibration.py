"""What methods see of texts: every token once, padding never, layers with one input together; statistics against plain formulas."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compress.calibration.input_factors import scale_inputs
from compress.calibration.inputs import Inputs
from compress.calibration.statistics import Hessian, Magnitudes, Moments
from compress.calibration.texts import CalibrationTexts, calibration_batches
from compress.common.errors import UserError
from compress.data.texts import calibration_texts
from compress.models.network.build import load_network
from compress.models.network.segments import Kind, Parts, Segment, segments_of
from compress.models.network.walk import Carry, Resident, walk
from compress.models.opened import read_text_side

CPU = torch.device("cpu")


def linears(parts: Parts) -> dict[str, nn.Linear]:
    return {f"{p}.{n}": m for p, part in parts.items() for n, m in part.named_modules() if isinstance(m, nn.Linear)}


def visited(folder: Path, texts: CalibrationTexts, visit) -> None:
    """Walk a network with texts and call `visit(segment, parts, inputs)` at blocks and heads."""
    network = load_network(folder, torch.float32)
    carry = Carry(texts.batches, CPU)

    def each(index: int, segment: Segment, parts: Parts) -> None:
        if segment.kind in (Kind.BLOCK, Kind.HEAD):
            visit(segment, parts, Inputs(carry, texts, index, segment))

    walk(Resident(network), each, carry)


def batches_of(folder: Path, count: int = 12, prompts: tuple[str, ...] = (), pool_prompt: bool = True) -> CalibrationTexts:
    _, tokenizer = read_text_side(folder)
    return calibration_batches(tokenizer, calibration_texts()[:count], prompts, pool_prompt=pool_prompt, max_tokens=40)


GROUPS = {
    "bert": [("query", "key", "value"), ("attention.output.dense",), ("intermediate.dense",), ("output.dense",)],
    "mistral": [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)],
}


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_layers_with_one_input_are_told_together_and_padding_never(make_model, kind: str) -> None:
    folder = make_model(kind)
    texts, rows = batches_of(folder), []

    def visit(_: Segment, parts: Parts, inputs: Inputs) -> None:
        seen: dict[str, int] = {}
        groups = inputs.see(parts, linears(parts), lambda leader, x, counts: seen.update({leader: seen.get(leader, 0) + len(x)}))
        rows.append(set(seen.values()))
        found = [tuple(name for name in names) for names in groups.values()]
        for wanted in GROUPS[kind]:
            assert any(
                len(names) == len(wanted) and all(n.endswith(w) for n, w in zip(names, wanted, strict=True)) for names in found
            )

    visited(folder, texts, visit)
    assert any((mask == 0).any() for _, mask in texts.batches)
    assert rows == [{texts.tokens}] * 2


@pytest.mark.parametrize("kind", ["bert", "mistral"])
def test_padding_changes_no_statistic(make_model, kind: str) -> None:
    """The same texts one by one, without any padding, give the same moments of every layer."""
    folder = make_model(kind)
    found = []
    together = batches_of(folder)
    pairs = [
        (ids[i : i + 1, : mask[i].sum()], mask[i : i + 1, : mask[i].sum()])
        for ids, mask in together.batches
        for i in range(len(ids))
    ]
    alone = CalibrationTexts(pairs, [mask for _, mask in pairs])
    for texts in (together, alone):
        moments: dict[str, Hessian] = {}

        def visit(_: Segment, parts: Parts, inputs: Inputs, moments: dict[str, Hessian] = moments) -> None:
            def see(leader: str, rows: torch.Tensor, counts: torch.Tensor) -> None:
                moments.setdefault(leader, Hessian(rows.shape[1], CPU)).add(rows, counts)

            inputs.see(parts, linears(parts), see)

        visited(folder, texts, visit)
        found.append({name: moment.mean() for name, moment in moments.items()})
    assert found[0].keys() == found[1].keys()
    for name, moment in found[0].items():
        torch.testing.assert_close(moment, found[1][name], rtol=1e-3, atol=1e-4 * float(moment.abs().max()))


def test_pooled_weights_are_each_token_s_share_in_its_text_s_mean(nv_embed: Path) -> None:
    prompt = "Instruct: find it\nQuery: "
    texts = batches_of(nv_embed, prompts=(prompt, ""), pool_prompt=False)
    counted: list[tuple[float, float]] = []
    heads: list[int] = []

    def visit(segment: Segment, parts: Parts, inputs: Inputs) -> None:
        totals = [0.0, 0.0]
        for place, pooled_only in enumerate((False, True)):

            def see(_: str, rows: torch.Tensor, counts: torch.Tensor, place: int = place) -> None:
                assert (counts > 0).all()
                totals[place] += float(counts.sum())
                if segment.kind is Kind.HEAD:
                    heads.append(len(rows))

            layers = dict([next(iter(linears(parts).items()))])
            inputs.see(parts, layers, see, pooled_only=pooled_only)
        if segment.kind is Kind.BLOCK:
            counted.append((totals[0], totals[1]))

    visited(nv_embed, texts, visit)
    pooled = int(sum(mask.sum() for mask in texts.pooled))
    assert pooled < texts.tokens
    assert counted[0] == (texts.tokens, pytest.approx(12))  # every token; every text
    assert sum(heads) == 2 * pooled  # the head is given pooled tokens alone, under either weighting


def test_prompts_come_in_turn_and_too_few_tokens_are_refused(nv_embed: Path) -> None:
    spec, tokenizer = read_text_side(nv_embed)
    texts = calibration_texts()[:4]
    made = calibration_batches(tokenizer, texts, ("find: ", ""), pool_prompt=True, max_tokens=40)
    expected = {tuple(row[:40]) for row in tokenizer([f"find: {texts[0]}", texts[1], f"find: {texts[2]}", texts[3]])}
    assert {tuple(ids[i, : mask[i].sum()]) for ids, mask in made.batches for i in range(len(ids))} == expected
    with pytest.raises(UserError, match="8 tokens leave no room for a text"):
        calibration_batches(tokenizer, texts, (max(spec.prompts.values(), key=len),), pool_prompt=False, max_tokens=8)


def test_statistics_are_the_plain_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, counts = torch.randn(301, 37, generator=generator), torch.rand(301, generator=generator)
    monkeypatch.setattr(Hessian, "ROWS", 64)
    monkeypatch.setattr(Hessian, "COLUMNS", 16)
    hessian, moments, magnitudes = Hessian(37, CPU), Moments(37, CPU, keep=20), Magnitudes(float(rows.abs().max()))
    for part in torch.arange(301).split(23):
        for statistic in (hessian, moments, magnitudes):
            statistic.add(rows[part], counts[part])
    weighed = rows.double() * counts[:, None].double()
    torch.testing.assert_close(hessian.mean().double(), weighed.t() @ rows.double() / counts.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.largest, rows.abs().amax(dim=0))
    torch.testing.assert_close(moments.mean_square, (weighed * rows).sum(dim=0).float() / counts.sum(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moments.mean_magnitude, weighed.abs().sum(dim=0).float() / counts.sum(), rtol=1e-4, atol=1e-6)
    kept = moments.rows()
    assert 20 <= len(kept) <= 41
    places = [int((rows == row).all(dim=1).nonzero()) for row in kept]
    assert places == sorted(set(places))
    assert places[-1] > 250
    # The percentile of a weighted sample, to a bin's width.
    values, order = rows.abs().flatten().sort()
    share = counts[:, None].expand_as(rows).flatten()[order].cumsum(0) / (counts.sum() * 37)
    exact = float(values[int(torch.searchsorted(share, 0.99))])
    assert magnitudes.percentile(99) == pytest.approx(exact, abs=2 * magnitudes.largest / magnitudes.BINS)
    assert magnitudes.percentile(100) == pytest.approx(magnitudes.largest)


def test_the_range_of_least_error_clips_outliers_and_keeps_even_values() -> None:
    even, outlier = Magnitudes(1.0), Magnitudes(100.0)
    even.add(torch.linspace(-1, 1, 10_001)[:, None], torch.ones(10_001))
    assert even.least_error() > 0.98
    values = torch.cat([torch.linspace(-1, 1, 10_001), torch.tensor([100.0])])
    outlier.add(values[:, None], torch.ones(len(values)))
    assert outlier.least_error() == pytest.approx(100, rel=0.05)  # one in ten thousand, but of a hundred times the size
    rare = Magnitudes(4.0)
    rare.add(torch.cat([torch.randn(200_000).clamp(-1, 1) * 0.2, torch.tensor([4.0])])[:, None], torch.ones(200_001))
    assert rare.least_error() < 3


@pytest.mark.parametrize(
    ("kind", "leader", "absorbed"),
    [
        ("mistral", "self_attn.q_proj", True),  # by the norm before
        ("mistral", "mlp.gate_proj", True),
        ("mistral", "mlp.down_proj", True),  # by up_proj
        ("mistral", "self_attn.o_proj", False),  # two query heads share a value head
        ("bert", "attention.self.query", False),  # the residual reads the norm too
        ("bert", "attention.output.dense", True),  # by value
        ("bert", "intermediate.dense", False),
        ("bert", "output.dense", False),  # behind GELU
        ("gemma3_text", "self_attn.q_proj", False),  # its norm multiplies by one plus the weight
    ],
)
def test_a_factor_goes_where_nothing_else_notices(make_model, kind: str, leader: str, absorbed: bool) -> None:
    folder = make_model(kind)
    texts = batches_of(folder)
    done = []

    def visit(_: Segment, parts: Parts, inputs: Inputs) -> None:
        layers = linears(parts)
        groups = inputs.see(parts, layers, lambda *_: None)
        names = next(names for names in groups.values() if leader in [re.sub(r"^.*?\.\d+\.", "", name) for name in names])
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        exact = inputs.sample(parts)
        factor = torch.from_numpy(np.random.default_rng(0).uniform(0.2, 5, layers[names[0]].in_features)).float()
        left = scale_inputs(parts, inputs, [layers[name] for name in names], factor)
        torch.testing.assert_close(inputs.sample(parts), exact, rtol=1e-3, atol=1e-4)
        done.append(left is None)
        for name in names:
            scaled = before[name] * (factor if left is None else 1)
            torch.testing.assert_close(layers[name].weight.detach(), scaled, rtol=1e-4, atol=1e-6)
        assert left is None or torch.equal(left, factor)

    visited(folder, texts, visit)
    assert done == [absorbed] * len(segments_of(load_network(folder, torch.float32))[1 : -1 if kind != "bert" else None])
