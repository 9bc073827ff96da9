"""What a plan goes by for a card: its own measured rate, or the published one, which it names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.common.card import Card
from compress.common.errors import UserError
from compress.models.source import find_shape
from compress.pipeline.gpu_rates import Rates, rate_for, read_rates
from compress.pipeline.measuring import EQUAL_LENGTHS, Measurements
from compress.pipeline.plan import describe, make_plan
from compress.pipeline.recipe_file import parse_recipe


def measured(**changes: Any) -> Rates:
    """Return the table with a card in it."""
    known = read_rates()
    rate = known.published.model_copy(update={"card": "NVIDIA H200", "operations_per_second": 6e14, **changes})
    return known.model_copy(update={"measured": (rate,)})


def test_a_measured_card_is_planned_with_its_own_rate() -> None:
    rate, said = rate_for("NVIDIA H200", measured())
    assert rate == 6e14
    assert said == "measured on this card: 600 TFLOPS in bfloat16"
    for card, rates, words in (
        ("NVIDIA L4", measured(), "not measured on this card"),
        ("NVIDIA H200", measured(precision="fp8"), "not measured on this card"),
        (None, measured(), "no card here"),
    ):
        rate, said = rate_for(card, rates)
        assert rate == read_rates().published.operations_per_second
        assert said.startswith(words)
        assert "published for Qwen3-Embedding-8B on an NVIDIA H100" in said


def test_the_published_rate_is_what_its_source_says() -> None:
    known = read_rates().published
    assert known.operations_per_second == pytest.approx(0.47 * 989e12, rel=0.01)
    # An 8B network takes about 14 to 16 GFLOP a token.
    assert 14e9 < known.operations_per_second / known.tokens_per_second < 16e9


@pytest.mark.parametrize("card", [None, "NVIDIA A100-SXM4-80GB"])
def test_a_plan_says_where_its_rate_is_from(monkeypatch: pytest.MonkeyPatch, card: str | None) -> None:
    monkeypatch.setattr("compress.pipeline.plan.read_card", lambda: None if card is None else Card(name=card))
    step = {"method": "distill", "texts": "texts.txt", "steps": 1000, "batch": 64, "learning_rate": 1e-4}
    said = describe(make_plan(parse_recipe({"steps": [step]}), find_shape("nvidia/NV-Embed-v2"), Path.cwd()))
    assert ("not measured on this card" if card else "no card here") in said
    assert "465 TFLOPS in bfloat16, published for" in said


def test_a_faulty_table_is_refused_by_file_and_key(tmp_path: Path) -> None:
    content = json.loads(read_rates().model_dump_json())
    content["published"]["tokens_per_second"] = 0
    (tmp_path / "rates.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"rates\.json.*tokens_per_second"):
        read_rates(tmp_path / "rates.json")


class OnCard(Measurements):
    """A run's measurements on a card, with nothing to measure."""

    def __init__(self, device: str, parameters: int, variant_bytes: int) -> None:
        object.__setattr__(self, "device", device)
        object.__setattr__(self, "shape", SimpleNamespace(parameters=parameters))
        object.__setattr__(self, "plan", SimpleNamespace(variant_bytes=variant_bytes, run_memory_bytes=variant_bytes + 10**9))
        object.__setattr__(self, "said", [])
        object.__setattr__(self, "say", self.said.append)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("capability", "free", "expected"),
    [
        ((9, 0), 80e9, ["float16", "bfloat16"]),
        ((7, 5), 80e9, ["float16"]),
        ((9, 0), 30e9, ["bfloat16"]),  # one of the two fits next to the variant
        ((9, 0), 12e9, []),
    ],
)
def test_half_precisions_that_a_card_holds_are_measured(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: float, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(80e9)))
    run = OnCard("cuda", 8 * 10**9, 8 * 10**9)
    assert run._dtypes_that_fit() == expected
    assert len(run.said) == (2 if capability[0] == 9 else 1) - len(expected)  # type: ignore[attr-defined]


def test_equal_lengths_are_timed_on_a_card_only() -> None:
    assert OnCard("cuda", 1, 1)._equal_lengths() == EQUAL_LENGTHS
    assert OnCard("cpu", 1, 1)._equal_lengths() == ()
