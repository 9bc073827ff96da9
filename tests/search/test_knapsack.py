"""The knapsack against brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from compress.search.knapsack import Item, Problem, front, solve, total

CHOICES = ("a", "b", "c")


def problem_of(seed: int, groups: int = 5) -> Problem:
    generator = np.random.default_rng(seed)
    items = [
        Item(
            f"g{group}",
            choice,
            float(generator.random()),
            {"bytes": float(generator.integers(1, 50)), "ms": float(generator.random())},
        )
        for group in range(groups)
        for choice in CHOICES
    ]
    return Problem(items, costs=("bytes", "ms"))


def by_brute_force(problem: Problem, bounds: dict[str, float]) -> float | None:
    groups = list(dict.fromkeys(item.group for item in problem.items))
    losses = []
    for picked in product(CHOICES, repeat=len(groups)):
        chosen = dict(zip(groups, picked, strict=True))
        if all(total(problem, chosen, cost) <= most for cost, most in bounds.items()):
            losses.append(total(problem, chosen, "loss"))
    return min(losses, default=None)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bounds", [{"bytes": 90.0}, {"bytes": 120.0, "ms": 2.0}, {"ms": 1.5}, {"bytes": 3.0}], ids=str)
def test_solutions_are_those_of_brute_force(seed: int, bounds: dict[str, float]) -> None:
    problem = problem_of(seed)
    chosen, best = solve(problem, bounds), by_brute_force(problem, bounds)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None
    assert set(chosen) == {f"g{group}" for group in range(5)}
    assert total(problem, chosen, "loss") == pytest.approx(best, abs=1e-7)
    assert all(total(problem, chosen, cost) <= most * (1 + 1e-6) for cost, most in bounds.items())


WIDE, NARROW = ("0.block", frozenset({"float16"})), ("0.block", frozenset({"narrow"}))
OF_BLOCKS = [
    Item("0.block", "float16", 0.0, {"bytes": 1.0}),
    Item("0.block", "narrow", 0.15, {"bytes": 1.0}),
    Item("0.block", "dropped", 0.4, {"bytes": 0.0}),
    Item("0.up", "a", 0.5, {"bytes": 10.0}, WIDE),
    Item("0.up", "b", 0.1, {"bytes": 20.0}, WIDE),
    Item("0.up", "a", 0.5, {"bytes": 5.0}, NARROW),
    Item("0.up", "b", 0.1, {"bytes": 10.0}, NARROW),
    Item("1.up", "a", 0.3, {"bytes": 10.0}),
]


def test_a_block_that_is_left_out_takes_no_choice_for_its_layers() -> None:
    problem = Problem([item for item in OF_BLOCKS if item.choice != "narrow" and item.given != NARROW])
    left_out = solve(problem, {"bytes": 21.0})
    assert left_out == {"0.block": "dropped", "1.up": "a"}
    assert total(problem, left_out, "bytes") == 10
    assert solve(problem, {"bytes": 31.0}) == {"0.up": "b", "0.block": "float16", "1.up": "a"}


def test_layers_of_a_narrow_block_take_what_narrow_ones_do() -> None:
    problem = Problem(OF_BLOCKS)
    narrow = solve(problem, {"bytes": 21.0})
    assert narrow == {"0.block": "narrow", "0.up": "b", "1.up": "a"}
    assert (total(problem, narrow, "bytes"), total(problem, narrow, "loss")) == pytest.approx((21, 0.55))
    assert solve(problem, {"bytes": 31.0}) == {"0.block": "float16", "0.up": "b", "1.up": "a"}
    assert solve(problem, {"bytes": 15.0}) == {"0.block": "dropped", "1.up": "a"}


def test_a_solution_can_be_asked_to_differ() -> None:
    problem = problem_of(1)
    first = solve(problem, {"bytes": 120.0})
    assert first is not None
    other = solve(problem, {"bytes": 120.0}, unlike=[(first, 2)])
    assert other is not None
    assert sum(other[group] != choice for group, choice in first.items()) >= 2


def test_the_front_gets_better_as_it_gets_larger() -> None:
    points = front(problem_of(2), "bytes", {}, points=8)
    assert len(points) >= 3
    assert [point.costs["bytes"] for point in points] == sorted(point.costs["bytes"] for point in points)
    assert [point.loss for point in points] == sorted((point.loss for point in points), reverse=True)
