"""Hidden states of a student and the model it was pruned from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests_support import folder_of

from compress.methods.distill.hidden import HiddenStates, followed
from compress.models.network.build import load_network
from compress.models.network.segments import blocks_of


def test_each_block_follows_the_last_one_before_its_next() -> None:
    assert followed((0, 4, 5), 6) == {0: 3, 1: 4, 2: 5}
    assert followed((0, 1, 2), 3) == {0: 0, 1: 1, 2: 2}
    assert followed((1, 2), 6) == {0: 1, 1: 5}


def test_hidden_states_are_the_blocks_own(bert: Path) -> None:
    whole, student = (load_network(folder_of(bert), torch.float32) for _ in range(2))
    ids, mask = torch.randint(5, 500, (3, 7)), torch.ones(3, 7, dtype=torch.int64)
    asked = HiddenStates(student, whole, {0: 0, 1: 1}, 2.0)
    with asked.watching():
        student(input_ids=ids, attention_mask=mask)
    assert float(asked.loss(ids, mask).detach()) == pytest.approx(0, abs=1e-10)
    before = [len(block._forward_hooks) for network in (whole, student) for block in blocks_of(network)[1]]
    assert before == [0, 0, 0, 0]
    shifted = HiddenStates(student, whole, {0: 1}, 2.0)
    with shifted.watching():
        student(input_ids=ids, attention_mask=mask)
    states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = 2 * (states[1] - states[2]).square().mean() / states[2].square().mean()
    assert float(shifted.loss(ids, mask).detach()) == pytest.approx(float(expected), rel=1e-4)
    shifted.loss(ids, mask).backward()
    assert all(parameter.grad is None for parameter in whole.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())
