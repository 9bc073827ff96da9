"""The inputs of layers: every token once, padding never, layers with one input together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibration_support import CPU, batches_of, linears, visited

from compress.calibration.inputs import Inputs
from compress.calibration.statistics import Hessian
from compress.calibration.texts import CalibrationTexts
from compress.models.network.segments import Kind, Parts, Segment

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


def test_what_a_layer_is_called_with_twice_is_seen_twice(make_model) -> None:
    """DeBERTa's query and key layers also project the table of relative positions; its value layer does not."""
    folder = make_model("deberta-v2")
    texts = batches_of(folder)
    found: list[dict[str, tuple[int, tuple[str, ...]]]] = []

    def visit(_: Segment, parts: Parts, inputs: Inputs) -> None:
        seen: dict[str, int] = {}
        groups = inputs.see(parts, linears(parts), lambda leader, x, counts: seen.update({leader: seen.get(leader, 0) + len(x)}))
        found.append({name.rpartition(".")[2]: (seen[name], tuple(names)) for name, names in groups.items()})

    visited(folder, texts, visit)
    table = 2 * 8 * len(texts.batches)
    for groups in found:
        assert groups["query_proj"][0] == texts.tokens + table
        assert [name.rpartition(".")[2] for name in groups["query_proj"][1]] == ["query_proj", "key_proj"]
        assert groups["value_proj"] == (texts.tokens, groups["value_proj"][1])
        assert len(groups["value_proj"][1]) == 1


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
